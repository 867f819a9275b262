"""Texts that the feeds do not hold, made of theirs: what is right there the original model says.

In a joined text the tokens of a row are pieces of other rows, one behind the other; then a few of them are others of the
vocabulary, drawn evenly, a different share in each row. How long a row is, padding, its first token and those that stand in most
rows stay. A descent that sees the same few texts again and again learns them by heart; one that never sees a text twice does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.model import Model
from ...runtime import Feeds
from ..fitting.varied_feeds import in_most_rows, loose_tokens, token_inputs

Array = npt.NDArray[Any]
_JOINED = 0.7  # of the rows; the others keep their own text
_SHORTEST = 16  # tokens of a piece, where the row that it is of has so many
_REPLACED = 0.2  # of the tokens of a row, at most


class JoinedTexts:
    """Makes them.

    Args:
        model: says which inputs are tokens.
        feeds: whose texts.
    """

    def __init__(self, model: Model, feeds: Feeds) -> None:
        self._words = token_inputs(model)
        self._fixed = {name: in_most_rows(feeds, name) for name in self._words}
        self._rows: dict[str, list[Array]] = {name: [] for name in self._words}
        for feed in feeds if self._words else ():
            for name in self._words:
                loose = loose_tokens(feed, name, self._fixed[name])
                if loose is not None:
                    self._rows[name] += [row[free] for row, free in zip(feed[name], loose, strict=True) if free.any()]
        self.any = any(self._rows.values())

    def of(self, feed: Mapping[str, Any], random: np.random.Generator, share: float = _JOINED) -> dict[str, Any]:
        """A feed like ``feed`` with other texts in it, joined in the part ``share`` of the rows."""
        found = dict(feed)
        for name, count in self._words.items():
            loose = loose_tokens(feed, name, self._fixed[name])
            if loose is None or not self._rows[name]:
                continue
            found[name] = ids = feed[name].copy()
            for row, free in zip(ids, loose, strict=True):
                places = np.flatnonzero(free)
                if len(places) and random.random() < share:
                    row[places] = self._joined(name, len(places), random)
                others = places[random.random(len(places)) < _REPLACED * random.random()]
                row[others] = random.integers(0, count, len(others))
        return found

    def _joined(self, name: str, length: int, random: np.random.Generator) -> Array:
        pieces: list[Array] = []
        rows, missing = self._rows[name], length
        while missing > 0:
            row = rows[random.integers(len(rows))]
            size = int(random.integers(min(_SHORTEST, len(row)), len(row) + 1))
            start = int(random.integers(0, len(row) - size + 1))
            pieces.append(row[start:start + size])
            missing -= size
        return np.concatenate(pieces)[:length]
