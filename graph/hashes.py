"""What identifies an input: the hash that a rewritten model carries of the model it was made from."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

from .files import Source
from .weights import StoredValues, Values

_TILE = 4 << 20


class InputHash:
    """Hashes a model in the background, as this costs as much as copying it.

    Args:
        path: the ``.onnx`` file.
        values: its weights; those outside the file are hashed too (and keep their digest for when they are written).
    """

    def __init__(self, path: Path, values: Iterable[Values]) -> None:
        self._path = path
        self._outside = [each for each in values if isinstance(each, StoredValues) and each.source.path != path]
        self._entries: dict[str, str] = {}
        self._source = Source(path)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        digest = hashlib.sha256()
        for start in range(0, self._source.size, _TILE):
            digest.update(self._source.read(start, min(start + _TILE, self._source.size)))
        self._entries["input_sha256"] = digest.hexdigest()
        if self._outside:
            data = hashlib.sha256()
            for values in self._outside:
                data.update(values.digest())
            self._entries["input_weights_sha256"] = data.hexdigest()

    def entries(self) -> dict[str, str]:
        """``input_sha256`` of the file, and ``input_weights_sha256`` of the SHA-256 of each external weight in turn."""
        self._thread.join()
        return dict(self._entries)
