"""Rows of a block's input and target, kept in memory for what cannot be read off their moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_LIMIT = 1 << 29  # bytes of rows that are kept for one block


class KeptRows:
    """Inputs x, targets t and weights of tokens, in float32.

    Args:
        feeds: how many will be seen, so that each has its part of ``limit``.
        limit: bytes; where a feed has more tokens than fit into its part, evenly spread ones are kept.
    """

    def __init__(self, feeds: int, limit: int = _LIMIT) -> None:
        self._share = max(1, limit // max(feeds, 1))
        self._parts: dict[bool, list[tuple[Array, Array, Array]]] = {False: [], True: []}

    def add(self, x: Array, t: Array, weights: Array, held: npt.NDArray[np.bool_]) -> None:
        """Keep rows ``x [n, d_model]``, ``t [n, d_out]`` of one feed; ``held``: which are held out of the fit."""
        most = max(1, self._share // (4 * (x.shape[1] + t.shape[1] + 1)))
        taken = np.arange(len(x)) if len(x) <= most else np.linspace(0, len(x) - 1, most).astype(np.int64)
        for which in (False, True):
            rows = taken[held[taken] == which]
            if len(rows):
                self._parts[which].append((x[rows].astype(np.float32), t[rows].astype(np.float32),
                                           weights[rows].astype(np.float32)))

    def part(self, held: bool) -> tuple[Array, Array, Array]:
        """x ``[n, d_model]``, t ``[n, d_out]`` and weights ``[n]`` of the tokens held out, or of the others."""
        if not self._parts[held]:
            return np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
        x, t, weights = zip(*self._parts[held], strict=True)
        return np.concatenate(x), np.concatenate(t), np.concatenate(weights)
