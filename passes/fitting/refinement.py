"""The neurons that stay, moved so that they do the work of those that left: gradient descent on one block alone.

    min over U, b, V, A, c of   Σ_t w_t ‖t_t − x_t A − act(x_t U + b) V − c‖²          gated: act(x G + b_G) ∘ (x U + b)

V, A and c have a closed form, U and G have none. So the closed form for the neurons as they are is where it begins; all
matrices go down together (Adam, each step a part of the size of its matrix, falling along a cosine to nothing); and V, A and c
are solved for once more at the end, held near what the descent found. It counts only if it is better on tokens held out.

Source: Adam, arXiv 1412.6980; the cosine, arXiv 1608.03983.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock, Projection
from ...runtime import Scatter
from .adam import adam_step, falling
from .kept_rows import KeptRows, Rows
from .neuron_fit import Features, NeuronFit, choose_ridge, refit

Array = npt.NDArray[Any]
Matrices = dict[str, Array]
_RATE = 0.02  # of the standard deviation of a matrix: the largest step of one of its numbers
_BATCH = 512  # tokens a step
_RISE = 20  # steps until the rate is reached
_CELLS, _REACH = 1 << 14, 64.0  # of the table of an activation: how many, and how far on either side
_AT_ONCE = 2048  # tokens whose neurons are in memory together
_TRIED, _PROBED = np.linspace(-4, 4, 33), 100.0  # where act(z) · u is tried: z, and how far u


class ActivationTable:
    """An activation and its slope, from a table with straight lines between, continued straight beyond its ends.

    Args:
        function: of numbers ``[n]``.
        low, high: where the table ends.
    """

    def __init__(self, function: Callable[[Array], Array], low: float, high: float) -> None:
        width = (high - low) / _CELLS
        values = function(np.linspace(low, high, _CELLS + 1))
        self._low, self._per_cell = np.float32(low), np.float32(1 / width)
        self._values, self._steps = values[:-1].astype(np.float32), np.diff(values).astype(np.float32)

    def __call__(self, z: Array) -> tuple[Array, Array]:
        """Value and slope at ``z`` (float32, any shape); what is not finite gives anything."""
        place = (z - self._low) * self._per_cell
        cell = np.clip(place, 0, _CELLS - 1).astype(np.int32)
        np.clip(cell, 0, _CELLS - 1, out=cell)  # what is no number has become one
        step = self._steps[cell]
        place -= cell
        place *= step
        place += self._values[cell]
        step *= self._per_cell
        return place, step


@dataclasses.dataclass
class Narrow:
    """A block of some neurons, as matrices that can be moved.

    Attributes:
        matrices: ``up [d_model, k]``, ``up_bias [k]``, in gated blocks ``gate`` and ``gate_bias``, ``down [k, d_out]``,
            ``offset [d_out]`` and, where there is an affine part, ``affine [d_model, d_out]``.
        curve: the activation.
        fixed: which of them stay as they are.
    """

    matrices: Matrices
    curve: ActivationTable
    fixed: frozenset[str] = frozenset()

    def projected(self, name: str, x: Array) -> Array:
        """What the projection ``up`` or ``gate`` gives, its bias added: ``[n, k]``."""
        found: Array = x @ self.matrices[name]
        found += self.matrices[f"{name}_bias"]
        return found

    def hidden(self, x: Array) -> tuple[Array, Array | None, Array | None, Array]:
        """``h [n, k]``, what the activation gave and the other branch (both None if ungated), and the activation's slope."""
        up = self.projected("up", x)
        if "gate" not in self.matrices:
            value, slope = self.curve(up)
            return value, None, None, slope
        value, slope = self.curve(self.projected("gate", x))
        return value * up, value, up, slope

    def gradients(self, x: Array, t: Array, weights: Array) -> Matrices:
        """Of half of Σ w ‖t − ŷ‖², for each of the matrices."""
        held = self.matrices
        h, value, up, slope = self.hidden(x)
        error = h @ held["down"]
        error += held["offset"]
        if "affine" in held:
            error += x @ held["affine"]
        error -= t
        error *= weights[:, None]
        found = {"down": h.T @ error, "offset": error.sum(axis=0)}
        if "affine" in held:
            found["affine"] = x.T @ error
        back = error @ held["down"].T
        if value is None or up is None:
            back *= slope
        else:
            slope *= up
            slope *= back
            found |= {"gate": x.T @ slope, "gate_bias": slope.sum(axis=0)}
            back *= value
        return found | {"up": x.T @ back, "up_bias": back.sum(axis=0)}


def refined(block: FFNBlock, start: NeuronFit, fit: NeuronFit, rows: KeptRows, passes: int,
            progress: Callable[[str], None] = lambda message: None) -> tuple[NeuronFit, str]:
    """``fit`` with its neurons moved and "", or as it is and the reason: it is not better on tokens held out, or cannot be.

    Args:
        start: the closed form on the tokens to fit to alone, where the descent begins; has at least one neuron.
        fit: the closed form on all tokens.
        rows: tokens to fit to and tokens held out; used up.
        passes: how often the descent goes through the tokens.
    """
    to_fit, held_out = rows.take(held=False), rows.take(held=True)
    if not len(to_fit[0]) or not len(held_out[0]):
        return fit, "no token is held out"
    acting = _activation(block)
    if acting is None:
        return fit, "its activation is no function of one number that all its neurons share"
    narrow = _narrow(block, start, acting)
    held = narrow.matrices
    inputs = block.d_model if start.affine is not None else 0
    everyone = np.arange(len(start.neurons))
    try:
        with np.errstate(all="ignore"):
            before = _unmoved_error(_solved(block, narrow, (to_fit, held_out), inputs), start)
            if not _descend(narrow, *to_fit, passes, progress):
                return fit, "the descent left the numbers that float32 holds"
            after = _solved(block, narrow, (to_fit, held_out), inputs)
            if not after.error < before:
                return fit, "it was not better on tokens held out"
            found = refit(Features.of(after.moments, _joined(held), inputs), everyone, after.ridge, after.error)
    except np.linalg.LinAlgError:
        return fit, "its neurons have no finite moments"
    return dataclasses.replace(found, neurons=fit.neurons, projections=_projections(block, fit, held)), ""


@dataclasses.dataclass(frozen=True)
class _Solved:
    """How well V, A and c, solved for, do with neurons as they are.

    Attributes:
        moments: of all tokens; held_out: of those held out; ridge: the λ that won; error: part of the target's variance, on the
            tokens held out.
    """

    moments: Scatter
    held_out: Features
    ridge: float
    error: float


def _solved(block: FFNBlock, narrow: Narrow, rows: tuple[Rows, Rows], inputs: int) -> _Solved:
    """Fitted to the first of ``rows``, λ chosen on the second: the same tokens before and after a descent.

    Raises:
        LinAlgError: the neurons or what they should give are beyond all numbers.
    """
    prior = _joined(narrow.matrices)
    fit, held_out = (_moments(block, narrow, *part) for part in rows)
    neurons = np.arange(len(narrow.matrices["down"]))
    fitting, judging = Features.of(fit, prior, inputs), Features.of(held_out, prior, inputs)
    if not all(np.isfinite(each).all() for features in (fitting, judging) for each in (features.ff, features.ft)):
        raise np.linalg.LinAlgError
    ridge, error = choose_ridge(fitting, judging, neurons)
    fit.merge(held_out)
    return _Solved(fit, judging, ridge, error)


def _unmoved_error(solved: _Solved, start: NeuronFit) -> float:
    """Of the neurons as they are, by ``start`` or by what was solved for now, whichever is better on the tokens held out."""
    judging = solved.held_out
    as_begun = judging.error(np.arange(len(start.neurons)), judging.prior, start.offset)
    return min(as_begun / max(judging.tt, 1e-30), solved.error)


def _joined(held: Matrices) -> Array:
    """The map of all features that ``held`` makes: of the inputs, where it has an affine part, and of the neurons."""
    return np.concatenate([*([held["affine"]] if "affine" in held else []), held["down"]]).astype(np.float64)


def _descend(narrow: Narrow, x: Array, t: Array, weights: Array, passes: int, progress: Callable[[str], None]) -> bool:
    """Move ``narrow`` in place; False where it came upon what is no finite number."""
    held = narrow.matrices
    weights = weights / (weights.mean() * np.float32(max(_variance(t, weights), 1e-30)))
    size = {name: float(held[_matrix_of(name)].std()) for name in held}
    names = [name for name in held if name not in narrow.fixed and size[name] > 0]
    first = {name: np.zeros_like(held[name]) for name in names}
    second = {name: np.zeros_like(held[name]) for name in names}
    random = np.random.default_rng(0)
    steps, step = passes * -(-len(x) // _BATCH), 0
    rise = min(_RISE, max(1, steps // 10))
    for number in range(passes):
        progress(f"moving neurons, {number + 1} of {passes}")
        order = random.permutation(len(x))
        for start in range(0, len(x), _BATCH):
            chosen = order[start:start + _BATCH]
            rate = _RATE * falling(step, steps, rise)
            step += 1
            found = narrow.gradients(x[chosen], t[chosen], weights[chosen] / np.float32(len(chosen)))
            if not np.isfinite(found["up_bias"]).all():
                return False
            for name in names:
                adam_step(held[name], found[name], first[name], second[name], step, rate * size[name])
    return all(bool(np.isfinite(matrix).all()) for matrix in held.values())


def _variance(t: Array, weights: Array) -> float:
    """Σ w ‖t − mean‖² / Σ w, without a copy of t."""
    total = float(weights.sum(dtype=np.float64))
    mean = (weights @ t) / total
    squares = sum(float(weights[start:start + _AT_ONCE] @ ((t[start:start + _AT_ONCE] - mean) ** 2).sum(axis=1))
                  for start in range(0, len(t), _AT_ONCE))
    return squares / total


def _matrix_of(name: str) -> str:
    """The matrix whose size the steps of ``name`` are a part of."""
    return {"up_bias": "up", "gate_bias": "gate", "offset": "down"}.get(name, name)


def _moments(block: FFNBlock, narrow: Narrow, x: Array, t: Array, weights: Array) -> Scatter:
    """Of [x, h, t], or [h, t] where there is no affine part."""
    found = Scatter()
    for start in range(0, len(x), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found.update(*([x[part]] if "affine" in narrow.matrices else []), _hidden(block, narrow, x[part]), t[part],
                     weights=weights[part])
    return found


def _hidden(block: FFNBlock, narrow: Narrow, x: Array) -> Array:
    """``h [n, k]``, of tokens for which the table or the product is not known to hold as the block's own nodes compute it."""
    gated = block.gate is not None
    up = narrow.projected("up", x)
    acting = narrow.projected("gate", x) if gated else up
    value, _ = narrow.curve(acting)
    beyond = ~(np.abs(acting) <= _REACH).all(axis=1)
    if gated:
        value *= up
        beyond |= ~(np.abs(up) <= _PROBED).all(axis=1)
    if beyond.any():
        leaves = [up[beyond]] * (2 if gated else 1)
        if gated:
            leaves[block.activation.gate] = acting[beyond]
        value[beyond] = block.region.evaluate(leaves, neuron=0, biased=True)
    return value


def _narrow(block: FFNBlock, fit: NeuronFit, function: Callable[[Array], Array]) -> Narrow:
    """The block as ``fit`` leaves it, in matrices by rows: steps take six times as long where gradients lie the other way."""
    held: Matrices = {"down": np.ascontiguousarray(fit.matrix, np.float32), "offset": fit.offset.astype(np.float32)}
    if fit.affine is not None:
        held["affine"] = np.ascontiguousarray(fit.affine, np.float32)
    fixed = set()
    branches = {"up": block.up} if block.gate is None else {"up": block.up, "gate": block.gate}
    for name, projection in branches.items():
        bias = projection.bias()
        held[name] = np.ascontiguousarray(projection.weight()[:, fit.neurons], np.float32)
        held[f"{name}_bias"] = (np.zeros(len(fit.neurons), np.float32) if bias is None
                                else bias[fit.neurons].astype(np.float32))
        if projection.linear.bias is None:
            fixed.add(f"{name}_bias")
    return Narrow(held, ActivationTable(function, -_REACH, _REACH), frozenset(fixed))


def _activation(block: FFNBlock) -> Callable[[Array], Array] | None:
    """``act`` in ``h = act(z)`` or ``h = act(g) · u``; None where the neurons differ, or h is no such product."""

    def at(z: Array, u: float, neuron: int | None = 0) -> Array:
        leaves = [z]
        if block.gate is not None:
            leaves = [np.full_like(z, u)] * 2
            leaves[block.activation.gate] = z
        return np.broadcast_to(block.region.evaluate(leaves, neuron=neuron, biased=True), z.shape)

    first = at(_TRIED, 1.0)
    each = at(np.repeat(_TRIED[:, None], block.d_ff, axis=1), 1.0, None)
    if not np.isfinite(first).all() or not np.allclose(each, first[:, None], rtol=1e-5, atol=1e-7):
        return None
    if block.gate is not None and not all(np.allclose(at(_TRIED, u), u * first, rtol=1e-4, atol=1e-6)
                                          for u in (-_PROBED, -2.0, 0.0, 3.0, _PROBED)):
        return None
    return lambda z: at(z, 1.0)


def _projections(block: FFNBlock, fit: NeuronFit, held: Matrices) -> tuple[tuple[Array, Array | None], ...]:
    """For each leaf of the region the matrix and the bias of its linear, as they have become."""
    found = []
    for number in range(len(block.region.leaves)):
        name = "gate" if block.gate is not None and number == block.activation.gate else "up"
        projection = block.gate if name == "gate" and block.gate is not None else block.up
        found.append((held[name], _bias(projection, fit, held[f"{name}_bias"])))
    return tuple(found)


def _bias(projection: Projection, fit: NeuronFit, total: Array) -> Array | None:
    """The linear's own part of a bias, the constants behind it being what they were."""
    linear = projection.linear
    if linear.bias is None:
        return None
    columns = fit.neurons if projection.columns is None else projection.columns[fit.neurons]
    before = projection.bias()
    assert before is not None
    return linear.bias()[columns].astype(np.float32) + (total - before[fit.neurons].astype(np.float32))
