"""Name an activation by its numbers: run the region on a grid and compare with the known functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .pointwise import Array, elu, gelu, gelu_tanh, mish, sigmoid, silu
from .region import Region

GRID = np.concatenate([np.linspace(-9, 9, 181), np.linspace(-0.6, 0.6, 25)])
KNOWN: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0), "relu2": lambda x: np.maximum(x, 0) ** 2, "gelu": gelu, "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: silu(x, 1.702), "silu": silu, "sigmoid": sigmoid, "tanh": np.tanh, "mish": mish,
    "softplus": lambda x: np.logaddexp(0, x), "elu": elu, "identity": lambda x: x,
}
_TOLERANCE = 1.5e-3  # of the largest value near zero; gelu and gelu_tanh differ by 4.7e-4 of it at their worst


@dataclass(frozen=True)
class Activation:
    """What a region computes.

    Attributes:
        name: a known function, or ``custom``.
        gate: the number of the leaf that the activation acts on.
        value: the number of the leaf that it is multiplied with, or None.
        scale: h = scale · act(gate) · value (1 in nearly every model).
    """

    name: str
    gate: int
    value: int | None
    scale: float = 1.0


def name_activation(region: Region) -> Activation | str:
    """The activation of ``region``, or a sentence saying why it is none."""
    try:
        if len(region.leaves) == 2:
            return _gated(region)
        result = region.evaluate([GRID], neuron=0, biased=True)
        return _ungated(np.broadcast_to(result, GRID.shape))
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # operators or constants that do not fit together
        return f"what lies between cannot be computed ({' '.join(str(error).split())[:200]})"


def _ungated(result: Array) -> Activation | str:
    if not np.isfinite(result).all():
        return Activation("custom", 0, None)
    if np.ptp(result) == 0:
        return "constant whatever goes in"
    name, scale = closest(result)
    if name == "identity" or _affine(result):
        return "nothing between the two linears but a linear function"
    return Activation(name, 0, None, scale)


def _gated(region: Region) -> Activation | str:
    wide = _separate(region, GRID[::3])
    if isinstance(wide, str) or wide.name != "custom":
        return wide
    near = _separate(region, GRID[::3] / 3)  # clipped variants are what they are named for near zero
    return near if isinstance(near, Activation) else wide


def _separate(region: Region, grid: Array) -> Activation | str:
    table = region.evaluate([grid[:, None], grid[None, :]], neuron=0, biased=True)
    table = np.broadcast_to(table, (len(grid), len(grid)))
    if not np.isfinite(table).all():
        return "not finite on a grid"
    row, column = _factor(table)
    if np.abs(table - np.outer(row, column)).max() > 2e-3 * np.abs(table).max():
        return "the two branches are not multiplied"
    if np.ptp(row) <= 1e-9 * np.abs(row).max() or np.ptp(column) <= 1e-9 * np.abs(column).max():
        return "one of the two branches does not matter"
    gate = 1 if _affine(row, grid) and not _affine(column, grid) else 0
    if not _affine(row if gate else column, grid):
        return Activation("custom", gate, 1 - gate)
    name, scale = closest(column if gate else row, grid, free_scale=True)
    return Activation(name, gate, 1 - gate, scale)


def _factor(table: Array) -> tuple[Array, Array]:
    """``f, g`` with ``table = f gᵀ``, if it is such a product: its row and column through its largest number."""
    i, j = np.unravel_index(np.abs(table).argmax(), table.shape)
    return table[:, j].copy(), table[i] / (table[i, j] or 1)


def _affine(curve: Array, grid: Array = GRID) -> bool:
    fit = np.polynomial.polynomial.polyfit(grid, curve, 1)
    error = np.abs(curve - np.polynomial.polynomial.polyval(grid, fit)).max()
    return bool(error <= 1e-3 * max(np.abs(curve).max(), 1e-30))


def closest(curve: Array, grid: Array = GRID, *, free_scale: bool = False) -> tuple[str, float]:
    """The known function that ``curve`` is on ``grid`` (up to a factor), or ``custom``, and the factor."""
    best, best_error, best_scale = "custom", _TOLERANCE, 1.0
    for name, function in KNOWN.items():
        target = function(grid)
        scales = {1.0} if not free_scale else set()
        scales.add(float(target @ curve / (target @ target)))
        for scale in scales:
            if scale == 0:
                continue
            error = float(np.abs(curve / scale - target).max() / 3)
            if error < best_error:
                best, best_error, best_scale = name, error, 1.0 if abs(scale - 1) < 1e-3 else scale
    if best == "custom":
        best, best_scale = _with_parameter(curve, grid)
    return best, best_scale


def _with_parameter(curve: Array, grid: Array) -> tuple[str, float]:
    """leaky_relu of any slope and elu of any alpha: straight on the right, one shape on the left."""
    right, left = grid > 0.05, grid < -0.05
    slopes = curve[right] / grid[right]
    scale = float(np.median(slopes))
    if scale == 0 or np.abs(slopes - scale).max() > 1e-2 * abs(scale):
        return "custom", 1.0
    below = curve[left] / scale
    slope = below / grid[left]
    factor = 1.0 if abs(scale - 1) < 1e-3 else scale
    if np.ptp(slope) < 1e-3 and abs(float(np.median(slope)) - 1) > 1e-3:
        return "leaky_relu", factor
    shape = np.expm1(grid[left])
    alpha = float(below @ shape / (shape @ shape))
    if alpha > 0 and np.abs(below - alpha * shape).max() < 1e-3 * alpha and (factor == 1 or abs(alpha - 1) < 1e-3):
        return "elu", factor  # not selu, which has both
    return "custom", 1.0
