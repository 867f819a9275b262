"""Zeros in a matrix, where they cost least on the inputs.

    wanda:      the smallest |W[i, j]| · √G[i, i] of each column j              nothing else changes
    sparsegpt:  the smallest W[i, j]² / U[i, i]², 128 inputs at a time           the other weights make good what is lost

G holds the second moments of the inputs, U is the upper Cholesky factor of (G + λI)⁻¹ (see :mod:`error_compensation`). With
``groups`` two weights of every four inputs in a row are zero, the pattern that sparse tensor cores read.

Source: Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..int8.error_compensation import STRIDE, inverse_factor, settle_rows

Array = npt.NDArray[Any]
GROUP, ZEROS = 4, 2


def by_wanda(matrix: Array, squares: Array, ratio: float, *, groups: bool) -> Array:
    """``matrix [d_in, d_out]`` with zeros. ``squares``: mean squares of the inputs, ``[d_in]``."""
    scores = np.abs(matrix) * np.sqrt(squares)[:, None]
    if groups:
        return np.where(_two_of_four(scores), 0, matrix)
    count = round(ratio * len(matrix))
    mask = np.zeros(matrix.shape, bool)
    np.put_along_axis(mask, np.argsort(scores, axis=0, kind="stable")[:count], True, axis=0)
    return np.where(mask, 0, matrix)


def by_sparsegpt(matrix: Array, gram: Array, ratio: float, *, groups: bool) -> Array:
    """``matrix [d_in, d_out]`` with zeros, the other weights changed to make good for them. ``gram``: ``[d_in, d_in]``."""
    factor = inverse_factor(gram.astype(np.float64), float(np.diag(gram).mean()))
    left = matrix.astype(np.float64)
    heights = np.diag(factor)

    def zeroing(start: int, part: Array) -> Callable[[int, Array], Array]:
        inverse = 1 / heights[start:start + len(part), None]
        mask = np.zeros(part.shape, bool)
        if not groups:
            scores = (np.abs(part) * inverse).reshape(-1)
            mask.reshape(-1)[np.argsort(scores, kind="stable")[:round(ratio * part.size)]] = True

        def zeroed(row: int, values: Array) -> Array:
            place = row - start
            if groups and place % GROUP == 0:
                four = slice(place, place + GROUP)
                mask[four] = _two_of_four(np.abs(part[four]) * inverse[four])
            return np.where(mask[place], 0, values)

        return zeroed

    settle_rows(left, factor, STRIDE, zeroing)
    return left


def _two_of_four(scores: Array) -> Array:
    """True for the two smallest of every four rows, ``[d_in, d_out]``."""
    fours = scores.reshape(-1, GROUP, scores.shape[1])
    mask = np.zeros(fours.shape, bool)
    np.put_along_axis(mask, np.argsort(fours, axis=1, kind="stable")[:, :ZEROS], True, axis=1)
    return mask.reshape(scores.shape)
