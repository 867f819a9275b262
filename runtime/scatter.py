"""Centred second moments of rows that stream by, multiplied in float32 and summed in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .specs import Array

_BLOCK = 2048  # rows multiplied at once


class Scatter:
    """Weighted mean and covariance of rows a = [x, y, …] (the groups of columns given to ``update``, side by side).

        S = Σ w (a − s)(a − s)ᵀ,   m = Σ w (a − s)        s fixed: the mean of the first rows
        mean = s + m / Σ w,        covariance = S / Σ w − (m / Σ w)(m / Σ w)ᵀ

    Near the mean the products are as small as the covariance itself, so float32 costs 1e-7 of it and not of the squared mean;
    a least-squares fit with a ridge of 1e-5 or more does not see that. Products of float32 take half the time of float64;
    sums are float64. Use :class:`Moments` where Gram matrices must be exact.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.widths: tuple[int, ...] = ()
        self._weight = 0.0
        self._center: Array = np.zeros(0)
        self._first: Array = np.zeros(0)
        self._second: Array = np.zeros((0, 0))
        self._waiting: list[tuple[Array, Array]] = []  # few rows at a time would spend the time on the sums

    def update(self, *groups: Array, weights: Array | None = None) -> None:
        """Add rows.

        Args:
            groups: one or more arrays ``[rows, d_i]``, the same widths each time.
            weights: ``[rows]``, not negative; None: ones.
        """
        widths, count = tuple(group.shape[1] for group in groups), len(groups[0])
        self.widths = self.widths or widths
        if widths != self.widths or any(len(group) != count for group in groups):
            raise ValueError(f"columns {widths} of {[len(group) for group in groups]} rows, expected columns {self.widths}")
        weights = np.ones(count) if weights is None else np.asarray(weights, np.float64)
        if len(weights) != count or (weights < 0).any():
            raise ValueError("weights must be one to a row and not negative")
        if not count:
            return
        if not self._center.size:
            self._center = np.concatenate([group.mean(axis=0, dtype=np.float64) for group in groups])
        starts = np.cumsum([0, *widths])
        near = np.empty((count, sum(widths)), np.float32)
        for number, group in enumerate(groups):
            columns = slice(starts[number], starts[number + 1])
            np.subtract(group, self._center[columns], out=near[:, columns], casting="unsafe")
        self._waiting.append((near, weights))
        self.rows += count
        if sum(len(part) for part, _ in self._waiting) >= _BLOCK:
            self._flush()

    def merge(self, other: Scatter) -> None:
        """Add the rows that ``other`` has seen."""
        other._flush()
        if not other.rows:
            return
        self._flush()
        if not self.rows:
            self.widths, self._center = other.widths, other._center
            self._first, self._second = np.zeros_like(other._first), np.zeros_like(other._second)
        if self.widths != other.widths:
            raise ValueError(f"columns {other.widths}, expected {self.widths}")
        shift = other._center - self._center
        self._second += other._second
        if shift.any():
            cross = np.outer(shift, other._first)
            self._second += cross + cross.T + other._weight * np.outer(shift, shift)
        self._first = self._first + other._first + other._weight * shift
        self._weight += other._weight
        self.rows += other.rows

    def without_first(self) -> Scatter:
        """The same of all groups but the first."""
        self._flush()
        made, start = Scatter(), self.widths[0] if self.widths else 0
        made.rows, made.widths, made._weight = self.rows, self.widths[1:], self._weight
        made._center, made._first, made._second = self._center[start:], self._first[start:], self._second[start:, start:]
        return made

    def to_arrays(self) -> dict[str, Array]:
        """What it holds, for a file."""
        self._flush()
        return {"widths": np.asarray(self.widths, np.int64), "rows": np.asarray(self.rows), "weight": np.asarray(self._weight),
                "center": self._center, "first": self._first, "second": self._second}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Scatter:
        """The one that gave ``arrays``."""
        made = cls()
        made.rows, made.widths = int(arrays["rows"]), tuple(int(width) for width in arrays["widths"])
        made._weight, made._center = float(arrays["weight"]), arrays["center"]
        made._first, made._second = arrays["first"], arrays["second"]
        return made

    @property
    def weight(self) -> float:
        """Σ w."""
        self._flush()
        return self._weight

    @property
    def mean(self) -> Array:
        """Σ w a / Σ w: ``[d]``, d the width of all groups together."""
        weight = self._checked_weight()
        return self._center + self._first / weight

    @property
    def covariance(self) -> Array:
        """Σ w (a − mean)(a − mean)ᵀ / Σ w: ``[d, d]``."""
        weight = self._checked_weight()
        covariance = self._second / weight
        covariance -= np.outer(self._first / weight, self._first / weight)
        return covariance

    def group_mean(self, index: int) -> Array:
        """Weighted mean of one group: ``[d_index]``."""
        starts = np.cumsum([0, *self.widths])
        return self.mean[starts[index]:starts[index + 1]]

    def _flush(self) -> None:
        if not self._waiting:
            return
        near = np.concatenate([part for part, _ in self._waiting])
        weights = np.concatenate([part for _, part in self._waiting])
        self._waiting = []
        if not self._first.size:
            self._first, self._second = np.zeros(near.shape[1]), np.zeros((near.shape[1], near.shape[1]))
        for start in range(0, len(near), _BLOCK):
            part, some = near[start:start + _BLOCK], weights[start:start + _BLOCK]
            self._first += some @ part
            part = part * np.sqrt(some).astype(np.float32)[:, None]
            self._second += part.T @ part
        self._weight += float(weights.sum())

    def _checked_weight(self) -> float:
        if not self.weight > 0:
            raise ValueError("no row was seen")
        return self._weight
