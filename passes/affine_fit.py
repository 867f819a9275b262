"""The least-squares affine map of a block, from streamed moments.

    A = (Σ_xx + λ·diag)⁻¹ Σ_xy,   c = E[y] − E[x] A

with centred, weighted moments in float64, and λ the one with the smallest error on tokens held out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg

from ..runtime import Moments

Array = npt.NDArray[Any]
_RIDGES = tuple(10.0 ** exponent for exponent in range(-7, 1))


def fit_affine(fit: Moments, held_out: Moments) -> tuple[Array, Array, float]:
    """The affine map of the second group of columns, y, from the first, x.

    Args:
        fit, held_out: moments of ``[x, y]`` over tokens to fit on, and over others that choose λ.

    Returns:
        A ``[d_in, d_out]``, c ``[d_out]`` and λ as a fraction of the mean variance of x. The final map is fitted on all
        rows together.
    """
    ridge = _RIDGES[2]
    if held_out.rows and fit.rows:
        mean_x, mean_y, xx, xy = _centred(fit)
        values, vectors = linalg.eigh(xx)
        turned = vectors.T @ xy
        errors = {}
        for candidate in _RIDGES:
            matrix = vectors @ (turned / (np.maximum(values, 0) + _absolute(candidate, xx))[:, None])
            errors[candidate] = error(held_out, matrix, mean_y - mean_x @ matrix)
        ridge = min(errors, key=lambda candidate: errors[candidate])
    everything = Moments()
    everything.merge(fit)
    everything.merge(held_out)
    mean_x, mean_y, xx, xy = _centred(everything)
    solved = linalg.solve(xx + _absolute(ridge, xx) * np.eye(len(xx)), xy, assume_a="pos")
    return solved, mean_y - mean_x @ solved, ridge


def error(moments: Moments, matrix: Array, offset: Array) -> float:
    """E‖y − xA − c‖² over the rows of ``moments``, without its part that no map changes (E‖y‖²)."""
    x, y = moments.group_mean(0), moments.group_mean(1)
    xx, xy = moments.cross(0, 0) / moments.weight, moments.cross(0, 1) / moments.weight
    return float(np.einsum("ij,ij->", matrix, xx @ matrix) - 2 * np.einsum("ij,ij->", matrix, xy)
                 + offset @ offset + 2 * offset @ (x @ matrix) - 2 * offset @ y)


def _centred(moments: Moments) -> tuple[Array, Array, Array, Array]:
    """E[x], E[y], Σ_xx, Σ_xy."""
    x, y = moments.group_mean(0), moments.group_mean(1)
    return (x, y, moments.cross(0, 0) / moments.weight - np.outer(x, x),
            moments.cross(0, 1) / moments.weight - np.outer(x, y))


def _absolute(ridge: float, xx: Array) -> float:
    return ridge * float(np.trace(xx)) / len(xx) + 1e-30
