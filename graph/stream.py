"""Weights on their way into a file: copied by the kernel where they lie in one, in tiles where they are computed."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import onnx

from .digests import WORKERS
from .files import Source
from .weights import InlineValues, StoredValues, Values

_TILE = 4 << 20
_STEP = 256 << 20  # bytes after which what was written is sent on to the disk
_SMALLEST_COPY = 1 << 20
_SYNCER = ThreadPoolExecutor(1, "sync")


class Sink:
    """A new file. What is written is sent on to the disk meanwhile, so that ``finish`` has little left to wait for.

    Raises:
        OSError: it is there already or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file: BinaryIO = open(path, "xb")  # noqa: SIM115 - open until closed
        self.size = 0
        self._synced = 0
        self._syncing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self.file.write(data)
        self._grew(len(data))

    def put(self, weight: Values) -> None:
        """Append ``weight`` as it is stored.

        Raises:
            ValueError: it came out with another number of bytes than it says.
        """
        before = self.size
        if isinstance(weight, StoredValues) and weight.nbytes >= _SMALLEST_COPY:
            self.copy(weight.source, weight.offset, weight.nbytes)
        elif isinstance(weight, StoredValues):
            self.write(weight.source.read(weight.offset, weight.offset + weight.nbytes))
        elif isinstance(weight, InlineValues) and isinstance(weight.held, onnx.TensorProto) and weight.held.HasField("raw_data"):
            self.write(weight.held.raw_data)
        else:
            self._put_computed(weight)
        if self.size - before != weight.nbytes:
            raise ValueError(f"a weight of {weight.nbytes} bytes came out with {self.size - before}")

    def copy(self, source: Source, offset: int, nbytes: int) -> None:
        """Append ``nbytes`` of ``source``; the kernel copies where it can."""
        self.file.flush()
        done = 0
        if hasattr(os, "copy_file_range"):
            with source.open() as file:
                while done < nbytes:
                    try:
                        count = os.copy_file_range(file.fileno(), self.file.fileno(), min(nbytes - done, _STEP), offset + done)
                    except OSError as error:
                        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
                            raise
                        break  # not between these two file systems
                    if not count:
                        break
                    done += count
                    self._grew(count)
            self.file.seek(0, os.SEEK_END)
        for start in range(offset + done, offset + nbytes, _TILE):
            self.write(source.read(start, min(start + _TILE, offset + nbytes)))

    def restart(self) -> None:
        """Forget what was written."""
        self.file.seek(0)
        self.file.truncate()
        self.size = 0

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        self.file.flush()
        self._settle()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close it, whatever became of it."""
        if self._syncing is not None and not self._syncing.cancel():
            self._syncing.exception()
        self.file.close()

    def _put_computed(self, weight: Values) -> None:
        digest = hashlib.sha256()
        hashed: Future[None] | None = None
        for tile in weight.tiles(_TILE):
            if hashed is not None:
                hashed.result()
            hashed = WORKERS.submit(digest.update, tile)  # while it is written
            self.write(tile)
        if hashed is not None:
            hashed.result()
        weight.note_digest(digest.digest())

    def _grew(self, count: int) -> None:
        self.size += count
        if self.size - self._synced >= _STEP and (self._syncing is None or self._syncing.done()):
            self._settle()
            self._synced = self.size
            self._syncing = _SYNCER.submit(os.fdatasync if hasattr(os, "fdatasync") else os.fsync, self.file.fileno())

    def _settle(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # an error of the disk is reported once only, and this may have been it
            self._syncing = None
