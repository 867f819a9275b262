"""What identifies an input: the hash that a rewritten model carries of the model it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from .digests import WORKERS, digest_of
from .files import Source
from .weights import StoredValues, Values

_PIECE = 64 << 20


class InputHash:
    """Identifies a model by its content.

    The weights outside the file, and then the file itself, are hashed in the background from now on; a file of more than 64 MiB,
    which holds its weights, in pieces of that size, by several threads.

    Args:
        path: the ``.onnx`` file.
        values: its weights.
    """

    def __init__(self, path: Path, values: Iterable[Values]) -> None:
        self._outside = [each for each in values if isinstance(each, StoredValues) and each.source.path != path]
        for each in self._outside:
            each.start_digest()
        source = Source(path)
        self._file: list[Future[bytes]] = [
            WORKERS.submit(digest_of, source, start, min(_PIECE, source.size - start))
            for start in range(0, max(source.size, 1), _PIECE)]

    def entries(self) -> dict[str, str]:
        """What identifies the file and its weights.

        ``input_sha256`` of the file, or ``input_pieces_sha256`` of the SHA-256 of each of its pieces where it has several;
        ``input_weights_sha256`` of the SHA-256 of each external weight in turn.
        """
        pieces = [each.result() for each in self._file]
        found = ({"input_sha256": pieces[0].hex()} if len(pieces) == 1 else
                 {"input_pieces_sha256": hashlib.sha256(b"".join(pieces)).hexdigest()})
        if self._outside:
            found["input_weights_sha256"] = hashlib.sha256(b"".join(each.digest() for each in self._outside)).hexdigest()
        return found

    def close(self) -> None:
        """Leave undone what nobody has begun."""
        for piece in self._file:
            piece.cancel()
        for each in self._outside:
            each.cancel_digest()
