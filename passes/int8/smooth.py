"""SmoothQuant: take large channels out of what a linear reads and put them into its weight (arXiv 2211.10438)."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.constant import fold
from ...graph.edit import consumers, is_output, producer, remove_dead, set_input
from ...graph.linear import Linear, read_linear
from ...graph.model import Model
from ...graph.norm import Norm, Slot, read_norm
from ...graph.shapes import root
from ...graph.types import numpy_type
from ..exact.scaled import scaled_weight
from ..exact.sharing import is_shared
from .input_statistics import InputStatistics
from .linear_groups import LinearGroup
from .weight_codes import Array

_SPREAD = 3.0  # how far, in standard deviations, a normalized feature is taken to reach where no feeds tell
_RANGE = 1e3  # factors lie between 1 / this and this
_WORTH = 1.5  # largest factor / smallest factor from which on it is done
_DEEP = 8
_UNEVEN = 16  # largest row of a weight / its smallest, that no trained weight has that stands behind its norm's scale


def factors(group: LinearGroup, strength: float, statistics: InputStatistics | None) -> Array | None:
    """What each feature that ``group`` reads is to be divided by.

        s_j = a_j^α / w_j^(1 − α),   a_j = max |x_j|,   w_j = max_k |W_jk|

    Without statistics, a_j = 3 |γ_j| + |β_j| of the LayerNorm that gives x, and that only where x is the residual stream itself
    (post-LN): in front of the blocks of a pre-LN model γ is small where the stream is large, and dividing by it would bring the
    outliers back.

    Args:
        strength: α.
        statistics: of what the group reads.

    Returns:
        ``[d_in]`` float64 with geometric mean 1; None where nothing is known of the features, they are alike, or a weight
        has another reader.
    """
    if any(is_shared(linear) for linear in group.linears):
        return None
    if statistics is not None:
        reach = statistics.largest.astype(np.float64)
    else:
        norm = _norm(root(group.input))
        if norm is None or norm.width != group.d_in or not norm.centred or _only_read_by(group, norm.output, _DEEP):
            return None
        reach = np.abs(norm.scale.load().astype(np.float64)).reshape(-1) * _SPREAD
        if norm.shift is not None:
            reach = reach + np.abs(norm.shift.load().astype(np.float64)).reshape(-1)
        reach = np.broadcast_to(reach, (group.d_in,))
    rows = np.max([np.abs(linear.weight().astype(np.float64)).max(axis=1) for linear in group.linears], axis=0)
    if not (np.isfinite(reach).all() and np.isfinite(rows).all()) or not reach.any() or not rows.any():
        return None
    floors = (np.exp(np.log(values[values > 0]).mean()) / _RANGE for values in (reach, rows))
    reach, rows = (np.maximum(values, floor) for values, floor in zip((reach, rows), floors, strict=True))
    found = reach ** strength / rows ** (1 - strength)
    found = np.clip(found / np.exp(np.log(found).mean()), 1 / _RANGE, _RANGE)
    return None if found.max() < _WORTH * found.min() else found


def counterweights(group: LinearGroup) -> Array | None:
    """What each feature is to be divided by so that all rows of the weights are alike, ``s_j = 1 / max_k |W_jk|``.

    For weights that hold the scale of their norm (``fold-norm``). Where some features of a residual stream are a hundred
    times the others, γ is small for them; with γ gone into the weight, the stream is all outliers and the weight has rows
    of nearly zero, which both round badly. None where the rows are even, or a weight has another reader.
    """
    if any(is_shared(linear) for linear in group.linears):
        return None
    rows = np.max([np.abs(linear.weight().astype(np.float64)).max(axis=1) for linear in group.linears], axis=0)
    if not np.isfinite(rows).all() or not rows.any():
        return None
    rows = np.maximum(rows, np.exp(np.log(rows[rows > 0]).mean()) / _RANGE)
    found = np.exp(np.log(rows).mean()) / rows
    return found if found.max() >= _UNEVEN * found.min() else None


def smooth(model: Model, group: LinearGroup, scale: Array) -> str:
    """Divide what ``group`` reads by ``scale`` and multiply the weights by it: exact algebra.

        x W = (x / s) (diag(s) W)

    The division goes into the norm that gives x where nothing else reads it; into the linear before a gate or a ReLU, where x is
    their product; else it is a Mul in front of the group.

    Returns:
        Where it went: ``norm``, ``linear`` or ``mul``.
    """
    place = "mul"
    if group.down:
        place = "linear"
        _divide_outputs(model, group, scale)
    elif _into_norm(model, group, scale):
        place = "norm"
    else:
        build = Builder(model, group.graph, group.name, group.onnx_type)
        smoothed = build.op("Mul", group.input, build.constant(1 / scale, "smooth_factors"), hint="smooth")
        for linear in group.linears:
            set_input(linear.node, 0, smoothed)
    for linear in group.linears:
        _scale_rows(model, group.graph, linear, scale)
    group.linears = [_read_again(linear) for linear in group.linears]
    return place


def can_divide_hidden(group: LinearGroup) -> bool:
    """Whether dividing the columns of the up projection divides what the down projection reads, exactly.

    That is so for the linear branch of a gated block, and for an activation with σ(z / s) = σ(z) / s, as ReLU.
    """
    block = group.block
    if block is None or not group.down or block.up.extra_bias or is_shared(block.up.linear) or block.region.inner_norm:
        return False
    if any(leaf.linear.fused_activation or leaf.linear.quantized for leaf in block.region.leaves):
        return False
    inside = {id(node) for node in (*block.region.nodes, *block.up.linear.nodes, block.down.linear.node)}
    values = [block.up.linear.output, *(output for node in block.region.nodes for output in node.outputs)]
    if any(is_output(block.graph, value) or any(id(node) not in inside for node in consumers(value)) for value in values):
        return False
    random = np.random.default_rng(0)
    leaves = [random.normal(size=(8, block.d_ff)) * 3 for _ in block.region.leaves]
    changed = list(leaves)
    at = 0 if block.activation.value is None else block.activation.value
    changed[at] = leaves[at] / 2
    whole, half = (block.region.evaluate(each, biased=True) for each in (leaves, changed))
    return bool(np.allclose(whole / 2, half, rtol=1e-9, atol=1e-12))


def _norm(tensor: gs.Tensor) -> Norm | None:
    node = producer(tensor)
    return None if node is None else read_norm(node)


def _into_norm(model: Model, group: LinearGroup, scale: Array) -> bool:
    norm = _norm(root(group.input))
    if norm is None or norm.width != group.d_in or norm.scale.overridable or (norm.shift and norm.shift.overridable):
        return False
    if norm.scale_at.node.op.startswith("Skip") or not _only_read_by(group, norm.output, _DEEP):
        return False
    for at, constant in ((norm.scale_at, norm.scale), (norm.shift_at, norm.shift)):
        if at is not None and constant is not None:
            _replace(model, group, at, constant.load().astype(np.float64).reshape(-1) / scale, constant.onnx_type)
    return True


def _only_read_by(group: LinearGroup, tensor: gs.Tensor, depth: int) -> bool:
    """Whether nothing but the linears of ``group`` reads ``tensor``, reshaped or not."""
    if is_output(group.graph, tensor) or depth == 0:
        return False
    for node in consumers(tensor):
        if any(node is linear.node for linear in group.linears):
            continue
        if node.op not in ("Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten") or node.inputs[0] is not tensor:
            return False
        if not _only_read_by(group, node.outputs[0], depth - 1):
            return False
    return True


def _divide_outputs(model: Model, group: LinearGroup, scale: Array) -> None:
    """``W_up ← W_up diag(1/s)``, ``b_up ← b_up / s`` for the columns that the block uses as its up projection."""
    block = group.block
    assert block is not None
    linear, columns = block.up.linear, block.up.columns
    divisor = np.ones(linear.d_out)
    divisor[slice(None) if columns is None else columns] = scale
    if linear.bias is not None:
        last = linear.nodes[-1]
        index = 2 if last is linear.node else next(i for i, value in enumerate(last.inputs) if fold(value) is not None)
        beta = float(last.attrs.get("beta", 1.0)) if last is linear.node else 1.0
        _replace(model, group, Slot(last, index), linear.bias().astype(np.float64) / divisor / beta, linear.onnx_type)
    _scale_weight(model, group.graph, linear, 1 / divisor, outputs=True)
    fresh = _read_again(linear)
    linear.weight, linear.bias, linear.weight_key, linear.source = fresh.weight, fresh.bias, fresh.weight_key, fresh.source


def _replace(model: Model, group: LinearGroup, at: Slot, values: Array, onnx_type: int) -> None:
    build = Builder(model, group.graph, group.name, onnx_type)
    old = producer(at.node.inputs[at.index])
    set_input(at.node, at.index, build.constant(values.astype(numpy_type(onnx_type)), "smoothed"))
    remove_dead(group.graph, [old] if old is not None else [])


def _scale_rows(model: Model, graph: gs.Graph, linear: Linear, scale: Array) -> None:
    _scale_weight(model, graph, linear, scale, outputs=False)


def _scale_weight(model: Model, graph: gs.Graph, linear: Linear, scale: Array, *, outputs: bool) -> None:
    """Multiply the weight along its inputs or outputs, in the layout that the node reads it in."""
    folded = fold(linear.node.inputs[1])
    assert folded is not None
    turned = bool(linear.node.attrs.get("transB", 0))
    old = producer(linear.node.inputs[1])
    build = Builder(model, graph, linear.node.name or "smooth", folded.onnx_type)
    set_input(linear.node, 1, build.constant(scaled_weight(folded, scale, int(turned != outputs)), "weight_smoothed"))
    remove_dead(graph, [old] if old is not None else [])


def _read_again(linear: Linear) -> Linear:
    fresh = read_linear(linear.node)
    assert fresh is not None
    return fresh
