"""Writing a model: weights streamed from file to file, the model whole under its name or not there at all.

The data file, if any, is written and synced first, under a name that carries the hash of its content; then the
``.onnx`` that names it, under a temporary name; then that is renamed into place. A killed run leaves the old model or
the new one. What it leaves beside that is removed by the next save to the same path.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import onnx

from .errors import InputError
from .tensors import tensors
from .weights import InlineValues, StoredValues, Values, stub_key
from .wire import expand

try:
    import fcntl
except ImportError:  # not on Windows: leftovers of other runs are then left alone
    fcntl = None  # type: ignore[assignment]

LARGEST_FILE = (1 << 31) - 1
"""Bytes that one protobuf message may have."""
_ALIGNMENT = 64
_SMALLEST_OUTSIDE = 4096  # saying where a tensor lies takes about 90 bytes
_TILE = 4 << 20
_HASHER = ThreadPoolExecutor(1, "hash")


def write_model(proto: onnx.ModelProto, values: Mapping[str, Values], path: Path, external: bool = False,
                limit: int = LARGEST_FILE) -> None:
    """Write the model to ``path``, whole or not at all. See :func:`stage_model`."""
    staged = stage_model(proto, values, path, external, limit)
    with staged:
        staged.commit()


def stage_model(proto: onnx.ModelProto, values: Mapping[str, Values], path: Path, external: bool = False,
                limit: int = LARGEST_FILE, metadata: Callable[[], Mapping[str, str]] | None = None) -> Staged:
    """Write the model beside ``path``, complete and loadable, without touching what is there.

    Args:
        proto: the model; its stubs stand for ``values``.
        values: stub key → weight.
        path: where it will be after ``commit``.
        external: put weights in a data file beside it; done unasked where the file would pass ``limit`` bytes.
        limit: the largest ``.onnx`` file to write.
        metadata: gives entries for ``metadata_props``, asked for as late as possible.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full.
    """
    staged = Staged(path)
    try:
        if not external:
            pieces, size = _inline(_with_metadata(proto, metadata), values)
            if size <= limit:
                staged.write(pieces)
                return staged
        staged.write([_external(proto, values, staged, limit, metadata)])
    except BaseException as error:
        staged.discard()
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from None
        raise
    return staged


class Staged:
    """A model written under a temporary name. As a context it is discarded on leaving, unless committed.

    Attributes:
        path: the file it will be.
        temporary: the file it is now; loads like any other.
        data: its data file, already under its own name, or None.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: Path | None = None
        self._created = False
        self.temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        if os.path.isdir(path):  # unlike Path.is_dir it does not fail on a name that is too long
            raise InputError(f"{path}: is a folder: give the path of the .onnx file to write")
        if not os.path.isdir(path.parent):
            raise InputError(f"{path}: there is no folder '{path.parent}': make it first")
        try:
            _remove_leftovers(path)
            self._file: BinaryIO | None = open(self.temporary, "xb")  # noqa: SIM115 - open until committed
        except OSError as error:
            raise _cannot_write(path, error) from None
        if fcntl is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX)  # says that this run is alive

    def write(self, pieces: list[bytes | Values]) -> None:
        """Write the ``.onnx`` itself."""
        assert self._file is not None
        for piece in pieces:
            _put(self._file, piece)
        self._file.flush()
        os.fsync(self._file.fileno())

    def copy(self, source: Path) -> None:
        """Write the bytes of ``source``, a model with its weights inside."""
        assert self._file is not None
        try:
            with open(source, "rb") as file:
                shutil.copyfileobj(file, self._file, _TILE)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def write_data(self, layout: list[tuple[int, Values]]) -> Path:
        """Write the data file: each weight at its offset. Returns its path."""
        digest = hashlib.sha256()
        partial = self.temporary.with_name(self.temporary.name + ".data")
        self.data = partial
        with open(partial, "xb") as file:
            position = 0
            for offset, weight in layout:
                _put(file, bytes(offset - position))
                written = _put(file, weight)
                position = offset + weight.nbytes
                digest.update(b"%d %d " % (offset, weight.nbytes) + written)
            file.flush()
            os.fsync(file.fileno())
        final = self.path.with_name(f"{self.path.name}.{digest.hexdigest()[:16]}.data")
        self._created = not final.exists()
        os.replace(partial, final)
        self.data = final
        return final

    def commit(self) -> None:
        """Give the model its name. What was there before is gone from then on."""
        old = _data_files(self.path)
        try:
            with contextlib.suppress(OSError):
                os.chmod(self.temporary, os.stat(self.path).st_mode & 0o777)
            os.replace(self.temporary, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            self.discard()
            raise _cannot_write(self.path, error) from None
        self._close()
        self.data = None
        _remove_unnamed(self.path, old)
        _remove_leftovers(self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self._close()
        for leftover in (self.temporary, self.data if self._created or _is_partial(self.data) else None):
            if leftover is not None:
                with contextlib.suppress(OSError):
                    leftover.unlink()
        self.data = None

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self.discard()


def _inline(proto: onnx.ModelProto, values: Mapping[str, Values]) -> tuple[list[bytes | Values], int]:
    def weight(key: str) -> tuple[Values, int, int]:
        return values[key], values[key].nbytes, values[key].field

    return expand(proto.SerializeToString(deterministic=True), weight)


def _with_metadata(proto: onnx.ModelProto, metadata: Callable[[], Mapping[str, str]] | None) -> onnx.ModelProto:
    if metadata is None:
        return proto
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    entries = metadata()
    kept = [(each.key, each.value) for each in model.metadata_props if each.key not in entries]
    del model.metadata_props[:]
    for key, value in (*kept, *entries.items()):
        model.metadata_props.add(key=key, value=value)
    return model


def _external(proto: onnx.ModelProto, values: Mapping[str, Values], staged: Staged, limit: int,
              metadata: Callable[[], Mapping[str, str]] | None) -> bytes | Values:
    """Write the data file; returns the bytes of the model that names it."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    for attributes_too in (False, True):
        layout: list[tuple[int, Values]] = []
        places: dict[object, int] = {}
        chosen: list[tuple[onnx.TensorProto, Values, int]] = []
        end = rest = 0
        for tensor, in_attribute in tensors(model):
            key = stub_key(tensor)
            if key is None:
                continue
            weight = values[key]
            if weight.nbytes < _SMALLEST_OUTSIDE or (in_attribute and not attributes_too):
                rest += weight.nbytes
                continue
            place = places.get(_identity(weight))
            if place is None:
                place = places[_identity(weight)] = -(-end // _ALIGNMENT) * _ALIGNMENT
                layout.append((place, weight))
                end = place + weight.nbytes
            chosen.append((tensor, weight, place))
        if rest + model.ByteSize() <= limit:
            break
    if layout:
        name = staged.write_data(layout).name
        for tensor, weight, place in chosen:
            del tensor.external_data[:]
            for key, value in (("location", name), ("offset", str(place)), ("length", str(weight.nbytes))):
                tensor.external_data.add(key=key, value=value)
    pieces, _ = _inline(_with_metadata(model, metadata), values)
    return b"".join(piece if isinstance(piece, bytes) else b"".join(piece.tiles()) for piece in pieces)


def _identity(weight: Values) -> object:
    """Equal for weights that are the same bytes of the same file, or the same object."""
    if isinstance(weight, StoredValues):
        return (str(weight.source.path), weight.offset, weight.nbytes)
    return id(weight)


def _put(file: BinaryIO, piece: bytes | Values) -> bytes:
    """Write ``piece``; returns the SHA-256 of a weight (nothing for bytes)."""
    if isinstance(piece, bytes):
        file.write(piece)
        return b""
    if isinstance(piece, InlineValues) and isinstance(piece.held, onnx.TensorProto) and piece.held.HasField("raw_data"):
        file.write(piece.held.raw_data)
        return hashlib.sha256(piece.held.raw_data).digest()
    written = 0
    if isinstance(piece, StoredValues) and piece._digest is not None:
        file.flush()
        if _copy(piece, file):
            return piece._digest
    digest = hashlib.sha256()
    hashed: Future[None] | None = None
    for tile in piece.tiles(_TILE):
        if hashed is not None:
            hashed.result()
        hashed = _HASHER.submit(digest.update, tile)  # while it is written
        file.write(tile)
        written += len(tile)
    if hashed is not None:
        hashed.result()
    if written != piece.nbytes:
        raise ValueError(f"a weight of {piece.nbytes} bytes came out with {written}")
    piece._digest = digest.digest()
    return piece._digest


def _copy(weight: StoredValues, file: BinaryIO) -> bool:
    """Let the kernel copy from file to file. False where it cannot."""
    if not hasattr(os, "copy_file_range") or weight.nbytes < _TILE:
        return False
    begin, done = file.tell(), 0
    with weight.source.open() as source:
        while done < weight.nbytes:
            try:
                count = os.copy_file_range(source.fileno(), file.fileno(), weight.nbytes - done, weight.offset + done,
                                           begin + done)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                break
            if not count:
                break
            done += count
    file.seek(begin + (done if done == weight.nbytes else 0))
    return done == weight.nbytes


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}): "
                      "choose another place, or make room and check the permissions")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_partial(path: Path | None) -> bool:
    return path is not None and path.name.endswith(".tmp.data")


def _data_files(path: Path) -> set[str]:
    """Names of the files beside ``path`` that the model there keeps its weights in."""
    from .store import read_model

    try:
        stored = read_model(path)
    except (InputError, OSError):
        return set()
    found = {values.source.path for values in stored.values.values() if isinstance(values, StoredValues)}
    return {file.name for file in found if file.parent == path.parent and file != path}


def _remove_unnamed(path: Path, old: set[str]) -> None:
    """Remove the data files of the model that was at ``path``, unless some model in the folder still names them."""
    if not old:
        return
    for model in (path, *path.parent.glob("*.onnx")):  # path itself need not end in .onnx
        old = old - _data_files(model)
    for name in old:
        file = path.with_name(name)
        if not file.is_symlink():
            with contextlib.suppress(OSError):
                file.unlink()


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files that runs killed while writing to ``path`` left behind, and data files nothing names."""
    if fcntl is None:
        return
    name = re.escape(path.name)
    temporary = re.compile(rf"\.{name}\.[0-9a-f]{{8}}\.tmp(\.data)?")
    data = re.compile(rf"{name}\.[0-9a-f]{{16}}\.data")
    found = list(os.scandir(path.parent))
    alive = False
    for entry in (entry for entry in found if temporary.fullmatch(entry.name) and entry.name.endswith(".tmp")):
        with _lock_or_none(Path(entry.path)) as stale:
            alive |= not stale
            if stale:
                for leftover in (entry.path, f"{entry.path}.data"):
                    with contextlib.suppress(OSError):
                        os.unlink(leftover)
    names = {entry.name for entry in found}
    lone = {each for each in names if each.endswith(".tmp.data") and temporary.fullmatch(each)
            and each.removesuffix(".data") not in names}
    unnamed = set() if alive else {each for each in names if data.fullmatch(each)}
    if unnamed:
        unnamed -= _data_files(path)
    if unnamed:
        unnamed -= set().union(*(_data_files(model) for model in path.parent.glob("*.onnx")))
    for each in lone | unnamed:
        with contextlib.suppress(OSError):
            path.with_name(each).unlink()


@contextlib.contextmanager
def _lock_or_none(path: Path) -> Iterator[bool]:
    """Whether no living run holds ``path``."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
