"""SHA-256 of parts of files, taken by threads of their own while something else goes on."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

from .files import Source

WORKERS = ThreadPoolExecutor(2, "hash")
_TILE = 1 << 20  # bytes; small enough to be still in the processor's cache when it is hashed


def digest_of(source: Source, offset: int, nbytes: int) -> bytes:
    """SHA-256 of ``nbytes`` of a file."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(nbytes, _TILE)))
    for start in range(0, nbytes, _TILE):
        part = buffer[:min(_TILE, nbytes - start)]
        source.read_into(part, offset + start)
        hasher.update(part)
    return hasher.digest()
