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
    """Identifies a model by its content.

    The file itself is hashed in the background from now on. Weights outside it are hashed when they are copied, and the
    rest of them when the hash is asked for.

    Args:
        path: the ``.onnx`` file.
        values: its weights.
    """

    def __init__(self, path: Path, values: Iterable[Values]) -> None:
        self._outside = [each for each in values if isinstance(each, StoredValues) and each.source.path != path]
        self._source = Source(path)
        self._digest = hashlib.sha256()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for start in range(0, self._source.size, _TILE):
            self._digest.update(self._source.read(start, min(start + _TILE, self._source.size)))

    def entries(self) -> dict[str, str]:
        """``input_sha256`` of the file, and ``input_weights_sha256`` of the SHA-256 of each external weight in turn."""
        self._thread.join()
        found = {"input_sha256": self._digest.hexdigest()}
        if self._outside:
            data = hashlib.sha256()
            for values in self._outside:
                data.update(values.digest())
            found["input_weights_sha256"] = data.hexdigest()
        return found
