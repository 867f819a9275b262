"""The least-squares affine map of a block, from streamed moments.

    A = (Σ_xx + λ·diag)⁻¹ Σ_xy,   c = E[y] − E[x] A

with centred, weighted moments in float64, and λ the one with the smallest error on tokens held out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

Array = npt.NDArray[Any]
_RIDGES = tuple(10.0 ** exponent for exponent in range(-7, 1))
_BLOCK = 1 << 12


@dataclass
class PairMoments:
    """Weighted sums over rows of x ``[n, d_in]`` and y ``[n, d_out]``: no row is kept.

    Attributes:
        weight: Σ w; count: rows.
        x, y: Σ w x, Σ w y.
        xx, xy: Σ w xᵀx ``[d_in, d_in]``, Σ w xᵀy ``[d_in, d_out]``; yy: Σ w ‖y‖².
    """

    weight: float = 0.0
    count: int = 0
    x: Array = field(default_factory=lambda: np.zeros(0))
    y: Array = field(default_factory=lambda: np.zeros(0))
    xx: Array = field(default_factory=lambda: np.zeros(0))
    xy: Array = field(default_factory=lambda: np.zeros(0))
    yy: float = 0.0

    def update(self, x: Array, y: Array, weights: Array) -> None:
        """Add rows, each with its weight."""
        if not self.count:
            self.x, self.y = np.zeros(x.shape[1]), np.zeros(y.shape[1])
            self.xx, self.xy = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1], y.shape[1]))
        for start in range(0, len(x), _BLOCK):
            a, b = x[start:start + _BLOCK].astype(np.float64), y[start:start + _BLOCK].astype(np.float64)
            w = weights[start:start + _BLOCK, None]
            weighted = a * w
            self.x += weighted.sum(axis=0)
            self.y += (b * w).sum(axis=0)
            self.xx += weighted.T @ a
            self.xy += weighted.T @ b
            self.yy += float((b * b * w).sum())
        self.weight += float(weights.sum())
        self.count += len(x)

    def add(self, other: PairMoments) -> None:
        """Add the rows of ``other``."""
        if not other.count:
            return
        if not self.count:
            self.x, self.y, self.xx, self.xy = other.x.copy(), other.y.copy(), other.xx.copy(), other.xy.copy()
        else:
            self.x += other.x
            self.y += other.y
            self.xx += other.xx
            self.xy += other.xy
        self.yy += other.yy
        self.weight += other.weight
        self.count += other.count

    def centred(self) -> tuple[Array, Array, Array, Array]:
        """E[x], E[y], Σ_xx, Σ_xy."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        return (mean_x, mean_y, self.xx / self.weight - np.outer(mean_x, mean_x),
                self.xy / self.weight - np.outer(mean_x, mean_y))

    def error(self, matrix: Array, offset: Array) -> float:
        """E‖y − xA − c‖² over these rows."""
        linear = float(np.einsum("ij,ij->", matrix, self.xx @ matrix) - 2 * np.einsum("ij,ij->", matrix, self.xy))
        constant = float(self.weight * offset @ offset + 2 * offset @ (self.x @ matrix) - 2 * offset @ self.y)
        return (linear + constant + self.yy) / self.weight


def fit_affine(fit: PairMoments, held_out: PairMoments) -> tuple[Array, Array, float]:
    """A ``[d_in, d_out]``, c ``[d_out]`` and the ridge λ (a fraction of the mean variance of x).

    λ is chosen on ``held_out``; the final map is fitted on all rows together.
    """
    ridge = _RIDGES[2]
    if held_out.count and fit.count:
        errors = {}
        mean_x, mean_y, xx, xy = fit.centred()
        values, vectors = linalg.eigh(xx)
        turned = vectors.T @ xy
        for candidate in _RIDGES:
            matrix = vectors @ (turned / (np.maximum(values, 0) + _absolute(candidate, xx))[:, None])
            errors[candidate] = held_out.error(matrix, mean_y - mean_x @ matrix)
        ridge = min(errors, key=lambda candidate: errors[candidate])
    everything = PairMoments()
    everything.add(fit)
    everything.add(held_out)
    mean_x, mean_y, xx, xy = everything.centred()
    solved = linalg.solve(xx + _absolute(ridge, xx) * np.eye(len(xx)), xy, assume_a="pos")
    return solved, mean_y - mean_x @ solved, ridge


def _absolute(ridge: float, xx: Array) -> float:
    return ridge * float(np.trace(xx)) / len(xx) + 1e-30
