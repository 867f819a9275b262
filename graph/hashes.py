"""What identifies an input: the hash that a rewritten model carries of the model it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from .digests import WORKERS, digest_of
from .files import Source
from .weights import StoredValues, Values


class InputHash:
    """Identifies a model by its content.

    The weights outside the file, and then the file itself, are hashed in the background from now on.

    Args:
        path: the ``.onnx`` file.
        values: its weights.
    """

    def __init__(self, path: Path, values: Iterable[Values]) -> None:
        stored = [each for each in values if isinstance(each, StoredValues)]
        self._outside = [each for each in stored if each.source.path != path]
        for each in self._outside:
            each.start_digest()
        source = next((each.source for each in stored if each.source.path == path), None) or Source(path)  # as it was loaded
        self._file: Future[bytes] = WORKERS.submit(digest_of, source, 0, source.size)

    def entries(self) -> dict[str, str]:
        """``input_sha256`` of the file, and ``input_weights_sha256`` of the SHA-256 of each external weight in turn."""
        found = {"input_sha256": self._file.result().hex()}
        if self._outside:
            found["input_weights_sha256"] = hashlib.sha256(b"".join(each.digest() for each in self._outside)).hexdigest()
        return found

    def close(self) -> None:
        """Leave undone what nobody has begun."""
        self._file.cancel()
        for each in self._outside:
            each.cancel_digest()
