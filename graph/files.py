"""Files that weights lie in: opened once, read by position, never mapped whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

_MOST_OPEN = 64  # descriptors held; a model may have a file for every tensor


class Source:
    """A regular file that is read by position.

    It stays open (up to a number of files), so that it can still be read after another file took its name.

    Raises:
        InputError: it is missing, no regular file, or may not be read.
    """

    _held = 0

    def __init__(self, path: Path, what: str = "file") -> None:
        self.path = path
        self._descriptor: int | None = None
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise InputError(f"{path}: is {kind}: give the path of an .onnx file")
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            raise InputError(f"{path}: no such {what}: check the path") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): "
                             "check the path and its permissions") from None
        self.size = status.st_size
        if Source._held < _MOST_OPEN:
            Source._held += 1
            self._descriptor = descriptor
        else:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)  # type: ignore[arg-type]
            Source._held -= 1

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``, all of them."""
        if self._descriptor is not None:
            return self._pread(self._descriptor, start, end)
        with self.open() as file:
            return self._pread(file.fileno(), start, end)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill ``buffer`` with the bytes from ``start`` on."""
        if self._descriptor is not None:
            self._fill(self._descriptor, buffer, start)
            return
        with self.open() as file:
            self._fill(file.fileno(), buffer, start)

    def _fill(self, descriptor: int, buffer: memoryview, start: int) -> None:
        if not hasattr(os, "preadv"):
            buffer[:] = self._pread(descriptor, start, start + len(buffer))
            return
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if not count:
                raise self._shrunk(start + done)
            done += count

    def _shrunk(self, position: int) -> InputError:
        return InputError(f"{self.path}: ends at byte {position}, but was longer before: "
                          "do not change a model while it is in use")

    def _pread(self, descriptor: int, start: int, end: int) -> bytes:
        parts, position = [], start
        while position < end:
            part = os.pread(descriptor, end - position, position)
            if not part:
                raise self._shrunk(position)
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def real_path(self) -> Path | None:
        """Where the file lies, links followed; None where another file has taken its name since."""
        path = Path(os.path.realpath(self.path))
        try:
            there, opened = os.stat(path), os.fstat(self._descriptor) if self._descriptor is not None else None
        except OSError:
            return None
        same = opened is None or (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)
        return path if same and there.st_size == self.size else None

    def open(self) -> BinaryIO:
        """A file object of its own over the same file."""
        if self._descriptor is not None:
            return os.fdopen(os.dup(self._descriptor), "rb", buffering=0)
        return open(self.path, "rb", buffering=0)


def external_path(model: Path, location: str) -> Path:
    """Where the external data file that ``model`` calls ``location`` is.

    It may lie in the model's folder or in the folder of the model's real path (Hugging Face caches are links), as
    ONNX Runtime allows.

    Raises:
        InputError: the location is absolute, climbs out of the folder, is a link that leaves both, or is missing.
    """
    where = f"{model}: external data '{location[:200]}'"
    parts = location.replace("\\", "/").split("/")
    if not location or "\0" in location or os.path.isabs(location) or location.startswith(("/", "\\")) or (
            len(location) > 1 and location[1] == ":"):
        raise InputError(f"{where} is not a path relative to the model: save the model with a relative one")
    if ".." in parts:
        raise InputError(f"{where} leaves the folder of the model: put the data file beside the model")
    folders = [model.parent, Path(os.path.realpath(model)).parent]
    try:
        found = next((folder / location for folder in folders if os.path.lexists(folder / location)), None)
        if found is None or not os.path.exists(found):
            raise InputError(f"{where} is missing: put the file beside the model")
        real = Path(os.path.realpath(found))
    except (OSError, ValueError) as error:
        raise InputError(f"{where} cannot be read ({error}): put the data file beside the model") from None
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise InputError(f"{where} is a link out of the folder of the model: put the file itself beside the model")
    return found
