"""For each neuron the range that its pre-activation z is in most of the time, and the line that fits its activation there.

    [l, r] = argmin over ranges that hold the part τ of the tokens of   min_{a,c} Σ_{z in [l,r]} w (σ(z) − a z − c)²

Ranges are whole bins of a histogram of z that also holds what a line is fitted from, so that every range of every neuron is
read off running sums and no activation is kept.

The parts τ may differ from neuron to neuron under one mean: those go up first whose lines lose least by it,

    minimize Σ_i s_i e_i(τ_i)   subject to   mean_i τ_i = coverage

with e_i the error inside the range and s_i what an error of the neuron costs.

Source: TARDIS, arXiv 2501.10054, where the tokens outside are mended at run time with the original weights.
Here they get the line, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LEVELS = np.linspace(0.5, 1, 11)
_BINS = 64
_FIRST = 1024  # rows after which the bins are laid out
_REACH = 4.0  # standard deviations; what is farther out is in the last bins


@dataclass(frozen=True)
class Lines:
    """``σ(z_i) ≈ slope_i z_i + intercept_i``, ``[d_ff]`` each; error: mean square error inside the ranges, ``[d_ff]``."""

    slope: Array
    intercept: Array
    error: Array


class Curves:
    """Histograms of z, and of what the activation makes of it, for neurons that stream by.

    The first rows say where the bins are; what is summed in them is exact wherever they are.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._waiting: list[tuple[Array, Array, Array]] = []
        self._mean: Array = np.zeros(0)
        self._size: Array = np.zeros(0)
        self._sums: Array = np.zeros((6, 0))

    def update(self, z: Array, h: Array, weights: Array) -> None:
        """Add rows: ``z`` and ``h`` are ``[rows, d_ff]``, ``weights`` is ``[rows]``."""
        self.rows += len(z)
        if self._mean.size:
            self._add(z, h, weights)
            return
        self._waiting.append((z, h, weights))
        if self.rows >= _FIRST:
            self._settle()

    def _settle(self) -> None:
        """Lay out the bins and fill them with what has waited for that."""
        if self._mean.size:
            return
        z, weights = (np.concatenate([each[number] for each in self._waiting]).astype(np.float64) for number in (0, 2))
        self._mean = np.average(z, axis=0, weights=weights)
        size = np.sqrt(np.average((z - self._mean) ** 2, axis=0, weights=weights))
        self._size = np.where(size > 0, size, 1)
        self._sums = np.zeros((6, z.shape[1] * _BINS))
        for each in self._waiting:
            self._add(*each)
        self._waiting = []

    def _add(self, z: Array, h: Array, weights: Array) -> None:
        u = (z - self._mean) / self._size
        place = np.clip(np.floor((u + _REACH) * (_BINS / (2 * _REACH))), 0, _BINS - 1).astype(np.int64)
        place += _BINS * np.arange(z.shape[1])
        y, w = h.astype(np.float64), np.broadcast_to(weights.astype(np.float64)[:, None], u.shape)
        for number, values in enumerate((w, w * u, w * y, w * u * u, w * u * y, w * y * y)):
            self._sums[number] += np.bincount(place.reshape(-1), values.reshape(-1), self._sums.shape[1])

    def lines(self, coverage: Array | float) -> Lines:
        """The best line of each neuron on its best range.

        Args:
            coverage: part of the tokens that the range holds, one for all or ``[d_ff]``.
        """
        self._settle()
        sums = self._sums.reshape(6, -1, _BINS)
        running = np.concatenate([np.zeros((*sums.shape[:2], 1)), sums.cumsum(axis=2)], axis=2)
        total = np.maximum(running[0, :, -1], 1e-300)
        needed = np.asarray(coverage) * total * (1 - 1e-9)
        count = np.arange(len(total))
        best = np.full((3, len(total)), np.inf)
        for left in range(_BINS):
            right = (running[0] < (running[0, :, left] + needed)[:, None]).sum(axis=1)
            inside = running[:, count, np.minimum(right, _BINS)] - running[:, :, left]
            found = np.stack(_line(inside))
            found[0] = np.where(right <= _BINS, found[0] / total, np.inf)
            best = np.where(found[0] < best[0], found, best)
        slope = best[1] / self._size
        return Lines(slope, best[2] - slope * self._mean, np.maximum(best[0], 0))

    def errors(self) -> Array:
        """Mean square error inside the best range at each of ``LEVELS``, ``[d_ff, levels]``."""
        return np.maximum.accumulate(np.stack([self.lines(level).error for level in LEVELS], axis=1), axis=1)


def spread_coverage(errors: Sequence[Array], coverage: float) -> list[Array]:
    """τ for the neurons of each block, ``[d_ff]`` each, their mean ``coverage`` (rounded to a step of ``LEVELS`` of one neuron).

    Args:
        errors: for each block s_i e_i, ``[d_ff, levels]``, not falling from level to level.
    """
    steps = np.diff(np.concatenate(errors), axis=1)
    costs = np.maximum.accumulate(steps, axis=1)  # a step waits for the ones before it
    wanted = round((coverage - LEVELS[0]) / (LEVELS[-1] - LEVELS[0]) * steps.size)
    taken = np.zeros(steps.size, np.int64)
    taken[np.argsort(costs, axis=None, kind="stable")[:wanted]] = 1
    levels = LEVELS[taken.reshape(steps.shape).sum(axis=1)]
    return np.split(levels, np.cumsum([len(each) for each in errors])[:-1])


def _line(sums: Array) -> tuple[Array, Array, Array]:
    """Σ w (y − a u − c)², a and c of the least-squares line, from Σ w, w u, w y, w u², w u y, w y²."""
    weight = np.maximum(sums[0], 1e-300)
    u, y = sums[1] / weight, sums[2] / weight
    variance, shared = sums[3] / weight - u * u, sums[4] / weight - u * y
    moves = variance > 1e-12 * (1 + u * u)
    slope = np.where(moves, shared / np.where(moves, variance, 1), 0)
    return sums[5] - weight * y * y - weight * slope * shared, slope, y - slope * u
