"""Writing a model: weights streamed from file to file, the model whole under its name or not there at all.

The data file, if any, is written and synced first, under a name that carries the hash of its content; then the
``.onnx`` that names it, under a temporary name; then that is renamed into place. A killed run leaves the old model or
the new one. What it leaves beside that is removed by the next save to the same path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from .errors import InputError
from .files import Source
from .layout import Layout, lay_out
from .leftovers import Farewell, claim, data_name, remove_leftovers, temporary_name
from .places import obstacle
from .stream import Sink
from .weights import StoredValues, Values
from .wire import expand

LARGEST_FILE = (1 << 31) - 1
"""Bytes that one protobuf message may have."""
Metadata = Callable[[], Mapping[str, str]]


def write_model(proto: onnx.ModelProto, values: Mapping[str, Values], path: Path, external: bool = False,
                limit: int = LARGEST_FILE) -> None:
    """Write the model to ``path``, whole or not at all. See :func:`stage_model`."""
    staged = stage_model(proto, values, path, external, limit)
    with staged:
        staged.commit()


def stage_model(proto: onnx.ModelProto, values: Mapping[str, Values], path: Path, external: bool = False,
                limit: int = LARGEST_FILE, metadata: Metadata | None = None) -> Staged:
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
        if external or not staged.write(proto, values, limit, metadata):
            layout = lay_out(proto, values, limit)
            if layout.weights:
                layout.point(staged.write_data(layout).name)
            staged.write(layout.proto, values, None, metadata)
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
        reason = obstacle(path)
        if reason is not None:
            raise InputError(f"{path}: the model cannot be written there, as {reason}: choose another place")
        try:
            remove_leftovers(path)
            while True:
                self.temporary = temporary_name(path)
                self._sink: Sink | None = Sink(self.temporary)
                claim(self._sink.file)
                if os.path.exists(self.temporary):
                    break
                self._sink.close()  # another run took it for a leftover before it was claimed
        except OSError as error:
            raise _cannot_write(path, error) from None

    def write(self, proto: onnx.ModelProto, values: Mapping[str, Values], limit: int | None = None,
              metadata: Metadata | None = None) -> bool:
        """Write the ``.onnx`` itself. False, and nothing written, where it would have more than ``limit`` bytes."""
        def weight(key: str) -> tuple[Values, int, int]:
            return values[key], values[key].nbytes, values[key].field

        sink = self._sink
        assert sink is not None
        written = proto
        if metadata is not None:
            written = onnx.ModelProto()
            written.CopyFrom(proto)
            del written.metadata_props[:]
        pieces, size = expand(written.SerializeToString(deterministic=True), weight)
        if limit is not None and size > limit:
            return False
        for piece in pieces:
            if isinstance(piece, bytes):
                sink.write(piece)
            else:
                sink.put(piece)
        if metadata is not None:  # last, as it takes longest to know: fields of a message may come in any order
            sink.write(_with_entries(proto, metadata()))
        if limit is not None and sink.size > limit:
            sink.restart()
            return False
        sink.finish()
        return True

    def copy(self, source: Path) -> None:
        """Write the bytes of ``source``, a model with its weights inside."""
        assert self._sink is not None
        try:
            file = Source(source)
            self._sink.copy(file, 0, file.size)
            self._sink.finish()
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def write_data(self, layout: Layout) -> Path:
        """Write the data file: each weight at its offset. Returns its path."""
        for _, weight in layout.weights:
            if isinstance(weight, StoredValues):
                weight.start_digest()
        self.data = self.temporary.with_name(self.temporary.name + ".data")
        sink = Sink(self.data)
        try:
            for offset, weight in layout.weights:
                sink.write(bytes(offset - sink.size))
                sink.put(weight)
            content = hashlib.sha256()
            for offset, weight in layout.weights:
                content.update(b"%d %d " % (offset, weight.nbytes) + weight.digest())
            sink.finish()
        finally:
            sink.close()
        final = data_name(self.path, content.hexdigest())
        self._created = not final.exists()
        os.replace(self.data, final)
        self.data = final
        return final

    def commit(self) -> None:
        """Give the model its name. What was there before is gone from then on."""
        farewell = None
        try:
            farewell = Farewell(self.path)
            with contextlib.suppress(OSError):
                os.chmod(self.temporary, os.stat(self.path).st_mode & 0o777)
            os.replace(self.temporary, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            if farewell is not None:
                farewell.close()
            self.discard()
            raise _cannot_write(self.path, error) from None
        self._close()
        self.data = None
        farewell.remove()
        remove_leftovers(self.path)

    def discard(self) -> None:
        """Remove what was written."""
        self._close()
        partial = self.data is not None and self.data.name.endswith(".tmp.data")
        for leftover in (self.temporary, self.data if self._created or partial else None):
            if leftover is not None:
                with contextlib.suppress(OSError):
                    leftover.unlink()
        self.data = None

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self.discard()


def _with_entries(proto: onnx.ModelProto, entries: Mapping[str, str]) -> bytes:
    """The ``metadata_props`` of ``proto``, ``entries`` put in."""
    only = onnx.ModelProto()
    only.metadata_props.extend(each for each in proto.metadata_props if each.key not in entries)
    for key, value in entries.items():
        only.metadata_props.add(key=key, value=value)
    return only.SerializeToString(deterministic=True)


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
