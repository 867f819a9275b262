"""What a save leaves beside a model, and who may remove it: data files that no model names, files of killed runs.

Nothing is removed that a model in the folder may still name; a model that cannot be read may name anything.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError

from .errors import InputError
from .files import Source
from .tensors import tensors
from .weights import nbytes_of
from .wire import Scanner, WireError

try:
    import fcntl
except ImportError:  # not on Windows: leftovers of other runs are then left alone
    fcntl = None  # type: ignore[assignment]

_CLAIM = "claim"


def temporary_name(path: Path) -> Path:
    """A name for a file that will be ``path``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def data_name(path: Path, digest: str) -> Path:
    """The name of the data file of ``path`` whose content has the hash ``digest``."""
    return path.with_name(f"{path.name}.{digest[:16]}.data")


def claim(file: BinaryIO) -> None:
    """Say that the run that writes ``file`` is alive, for as long as it is open."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)


def scratch_folder(folder: Path, prefix: str) -> tuple[Path, BinaryIO]:
    """A new folder in ``folder`` whose name begins with ``prefix``, and a file in it that is open for as long as it is needed.

    Folders that killed runs left there are removed.
    """
    for place in folder.glob(f"{prefix}*"):
        with _unclaimed(place / _CLAIM) as stale:
            if stale:
                shutil.rmtree(place, ignore_errors=True)
    while True:
        place = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        file = open(place / _CLAIM, "xb")  # noqa: SIM115 - open, and so claimed, until the end
        claim(file)
        if os.path.exists(file.name):
            return place, file
        file.close()  # another run took it for a leftover before it was claimed


def data_files(path: Path) -> set[str]:
    """Names of the files beside ``path`` that the model there keeps its weights in; none where there is no such model.

    A file of which its weights are less than half is not its own to take along: it may be anything.
    """
    try:
        proto = onnx.ModelProto.FromString(_skeleton(path))
    except (InputError, WireError, DecodeError, OSError):
        return set()
    parts: dict[str, dict[tuple[str, str], int]] = {}
    for tensor, _ in tensors(proto):
        entries = {entry.key: entry.value for entry in tensor.external_data if isinstance(entry.value, str)}
        place = Path(os.path.normpath(entries.get("location", "..")))
        if "\0" in entries.get("location", "") or len(place.parts) != 1 or place.name in ("", "..", path.name):
            continue
        offset, length = entries.get("offset", ""), entries.get("length", "")
        nbytes = int(length) if length.isdecimal() and len(length) < 20 else nbytes_of(tuple(tensor.dims), tensor.data_type)
        parts.setdefault(place.name, {})[(offset, length)] = nbytes
    return {name for name, lengths in parts.items() if 2 * sum(lengths.values()) >= _size(path.with_name(name))}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Farewell:
    """Removes the data files of the model that a save replaces, also if the run is killed in between.

    Data files with names that a save gives are known by their names. Other names are written down beforehand, in a file
    that the next run finds.

    Args:
        path: the model, as yet the old one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = data_files(path)
        self._note: Path | None = None
        self._file: BinaryIO | None = None
        strangers = sorted(name for name in self._names if not _data_pattern(path).fullmatch(name))
        if strangers and fcntl is not None:
            self._note = temporary_name(path).with_suffix(".old")
            self._file = open(self._note, "xb")  # noqa: SIM115 - open, and so claimed, until the end
            claim(self._file)
            self._file.write("\0".join(strangers).encode())
            self._file.flush()

    def remove(self) -> None:
        """The new model is in place: remove what it does not need."""
        _remove(self._path, self._names)
        self.close()

    def close(self) -> None:
        """The old model stays, or what it needed is gone."""
        if self._note is not None:
            with contextlib.suppress(OSError):
                self._note.unlink()
        if self._file is not None:
            self._file.close()


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that runs killed while writing to ``path`` left behind, and data files nothing names."""
    if fcntl is None:
        return
    temporary = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|tmp\.data|old)")
    names = {entry.name for entry in os.scandir(path.parent)}
    ours = {name for name in names if temporary.fullmatch(name)}
    alive = False
    for name in ours:
        if name.endswith(".tmp.data"):
            if name.removesuffix(".data") not in names:
                _unlink(path.with_name(name))
            continue
        with _unclaimed(path.with_name(name)) as stale:
            alive |= not stale
            if stale and name.endswith(".old"):
                _remove(path, _noted(path.with_name(name)))
            if stale:
                _unlink(path.with_name(name))
                _unlink(path.with_name(f"{name}.data"))
    if not alive:
        _remove(path, {name for name in names if _data_pattern(path).fullmatch(name)})


def _data_pattern(path: Path) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{16}}\.data")


def _noted(note: Path) -> set[str]:
    names = note.read_bytes().decode("utf-8", "replace").split("\0")
    return {name for name in names if name and os.path.basename(name) == name}


def _remove(path: Path, names: Iterable[str]) -> None:
    """Remove the files called ``names`` beside ``path``, except those that a model in the folder may name."""
    names = {name for name in names if os.path.lexists(path.with_name(name))}
    for model in (path, *path.parent.glob("*.onnx")):  # path itself need not end in .onnx
        if not names:
            return
        try:
            skeleton = _skeleton(model)
        except FileNotFoundError:
            continue
        except (InputError, WireError, OSError):
            return
        names = {name for name in names if os.fsencode(name) not in skeleton}
    for name in names:
        if not path.with_name(name).is_symlink():
            _unlink(path.with_name(name))


def _skeleton(path: Path) -> bytes:
    if not os.path.lexists(path):
        raise FileNotFoundError(path)
    return Scanner(Source(path), lambda payload: "0").skeleton()


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def _unclaimed(path: Path) -> Iterator[bool]:
    """Whether no living run holds ``path``."""
    if fcntl is None:
        yield False
        return
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
