"""Rows of a block's input and target, kept in memory for what cannot be read off their moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = tuple[Array, Array, Array]
_LIMIT = 1 << 29  # bytes of rows that are kept for one block


class KeptRows:
    """Inputs x, targets t and weights of tokens, in float32.

    Args:
        feeds: how many will be seen, so that each has its part of ``limit``.
        limit: bytes. Where a feed has more tokens than fit into its part, evenly spread ones are kept and count for the others
            too; where not even one token of each feed fits, the first feeds are kept.
    """

    def __init__(self, feeds: int, limit: int = _LIMIT) -> None:
        self._limit, self._share, self._used = limit, limit // max(feeds, 1), 0
        self._parts: dict[bool, list[Rows]] = {False: [], True: []}

    def add(self, x: Array, t: Array, weights: Array, held: npt.NDArray[np.bool_]) -> None:
        """Keep rows ``x [n, d_model]``, ``t [n, d_out]`` of one feed; ``held``: which are held out of the fit."""
        size = 4 * (x.shape[1] + t.shape[1] + 1)
        part = min(1.0, max(1, self._share // size) / max(len(x), 1))
        for which in (False, True):
            rows = np.flatnonzero(held == which)
            count = min(len(rows), max(1, int(part * len(rows))))
            if not count or self._used + count * size > self._limit:
                continue
            self._used += count * size
            taken = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
            self._parts[which].append((x[taken].astype(np.float32), t[taken].astype(np.float32),
                                       (weights[taken] * (len(rows) / count)).astype(np.float32)))

    def take(self, held: bool) -> Rows:
        """x ``[n, d_model]``, t ``[n, d_out]`` and weights ``[n]`` of the tokens held out, or of the others; once."""
        parts, self._parts[held] = self._parts[held], []
        if not parts:
            return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
        columns = [list(column) for column in zip(*parts, strict=True)]
        del parts
        joined = []
        while columns:
            joined.append(np.concatenate(columns.pop(0)))
        return joined[0], joined[1], joined[2]
