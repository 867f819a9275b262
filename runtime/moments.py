"""First and second moments of values that stream by. No activation is kept."""

from __future__ import annotations

import numpy as np

from .specs import Array

_BLOCK = 4096  # rows multiplied at once, so that a float64 copy of the input stays small


class Moments:
    """Weighted count, mean and Gram matrix of rows, in float64.

    With rows a = [1, x, y, …] (the groups of columns given to ``update``, side by side) and weights w ≥ 0 it holds
    S = Σ w a aᵀ, from which everything else is read. Float32 input is multiplied in float64: least squares square the
    condition number, so float32 products would not do.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.widths: tuple[int, ...] = ()
        self._sums: Array = np.zeros((1, 1))

    def update(self, *groups: Array, weights: Array | None = None) -> None:
        """Add rows.

        Args:
            groups: one or more arrays ``[rows, d_i]``, the same widths each time.
            weights: ``[rows]``, not negative; None: ones.
        """
        widths, count = tuple(group.shape[1] for group in groups), len(groups[0])
        if not self.widths:
            self.widths = widths
            self._sums = np.zeros((1 + sum(widths), 1 + sum(widths)))
        if widths != self.widths or any(len(group) != count for group in groups):
            raise ValueError(f"columns {widths} of {[len(group) for group in groups]} rows, expected columns {self.widths}")
        if weights is not None and (len(weights) != count or (np.asarray(weights) < 0).any()):
            raise ValueError("weights must be one to a row and not negative")
        for start in range(0, count, _BLOCK):
            part = slice(start, start + _BLOCK)
            block = np.concatenate([np.ones((len(groups[0][part]), 1)), *(group[part] for group in groups)], axis=1,
                                   dtype=np.float64)
            if weights is not None:
                block *= np.sqrt(np.asarray(weights[part], np.float64))[:, None]
            self._sums += block.T @ block
        self.rows += count

    def merge(self, other: Moments) -> None:
        """Add the rows that ``other`` has seen."""
        if not other.widths:
            return
        if not self.widths:
            self.widths, self._sums = other.widths, np.zeros_like(other._sums)
        if self.widths != other.widths:
            raise ValueError(f"columns {other.widths}, expected {self.widths}")
        self._sums += other._sums
        self.rows += other.rows

    @property
    def weight(self) -> float:
        """Σ w."""
        return float(self._sums[0, 0])

    @property
    def mean(self) -> Array:
        """Σ w a / Σ w without the leading 1: ``[d]``, d the width of all groups together."""
        return self._sums[0, 1:] / self._checked_weight()

    @property
    def augmented(self) -> Array:
        """Σ w a aᵀ with the leading 1: ``[1 + d, 1 + d]``."""
        return self._sums

    @property
    def gram(self) -> Array:
        """Σ w a aᵀ without the leading 1: ``[d, d]``."""
        return self._sums[1:, 1:]

    @property
    def covariance(self) -> Array:
        """Σ w (a − mean)(a − mean)ᵀ / Σ w: ``[d, d]``."""
        mean = self.mean
        return self.gram / self.weight - np.outer(mean, mean)

    def cross(self, first: int, second: int) -> Array:
        """Σ w xᵢ xⱼᵀ of two groups: ``[d_first, d_second]``."""
        starts = np.cumsum([0, *self.widths])
        return self.gram[starts[first]:starts[first + 1], starts[second]:starts[second + 1]]

    def group_mean(self, index: int) -> Array:
        """Weighted mean of one group: ``[d_index]``."""
        starts = np.cumsum([0, *self.widths])
        return self.mean[starts[index]:starts[index + 1]]

    def _checked_weight(self) -> float:
        if not self.weight > 0:
            raise ValueError("no row was seen")
        return self.weight


class DiagonalMoments:
    """Moments of pairs (z, h), feature by feature: what a straight line through each neuron's curve needs."""

    def __init__(self) -> None:
        self.rows = 0
        self.weight = 0.0
        self._sums: Array = np.zeros((5, 0))

    def update(self, z: Array, h: Array, weights: Array | None = None) -> None:
        """Add rows: ``z`` and ``h`` are ``[rows, d]``, ``weights`` is ``[rows]`` and not negative (None: ones)."""
        if z.shape != h.shape:
            raise ValueError(f"z is {z.shape}, h is {h.shape}")
        if not self._sums.size:
            self._sums = np.zeros((5, z.shape[1]))
        for start in range(0, len(z), _BLOCK):
            part = slice(start, start + _BLOCK)
            a, b = np.asarray(z[part], np.float64), np.asarray(h[part], np.float64)
            w = np.ones(len(a)) if weights is None else np.asarray(weights[part], np.float64)
            self._sums += np.stack([w @ a, w @ b, *(np.einsum("r,rd,rd->d", w, one, two)
                                                    for one, two in ((a, a), (a, b), (b, b)))])
            self.weight += float(w.sum())
        self.rows += len(z)

    def merge(self, other: DiagonalMoments) -> None:
        """Add the rows that ``other`` has seen."""
        if other._sums.size:
            self._sums = other._sums + (self._sums if self._sums.size else 0.0)
            self.rows += other.rows
            self.weight += other.weight

    @property
    def mean_z(self) -> Array:
        """Σ w z / Σ w: ``[d]``."""
        return self._means()[0]

    @property
    def mean_h(self) -> Array:
        """Σ w h / Σ w: ``[d]``."""
        return self._means()[1]

    @property
    def variance_z(self) -> Array:
        """Weighted variance of z: ``[d]``, never negative."""
        means = self._means()
        return np.maximum(means[2] - means[0] ** 2, 0.0)

    @property
    def variance_h(self) -> Array:
        """Weighted variance of h: ``[d]``, never negative."""
        means = self._means()
        return np.maximum(means[4] - means[1] ** 2, 0.0)

    @property
    def covariance(self) -> Array:
        """Weighted covariance of z and h: ``[d]``."""
        means = self._means()
        return means[3] - means[0] * means[1]

    def _means(self) -> Array:
        if not self.weight > 0:
            raise ValueError("no row was seen")
        return self._sums / self.weight
