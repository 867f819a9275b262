"""A block once more with some of its neurons, beside the block: projections and region cut to those neurons.

    h_S = region_S(x W_up[:, S] + b_S, x W_gate[:, S] + …)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from .block import OVERRIDABLE, FFNBlock
from .builder import Builder
from .constant import fold
from .model import Model
from .region import NORMS, Leaf
from .shapes import ALIASES

Indices = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
Project = Callable[[Leaf, Array, "Array | None", str], gs.Tensor]  # of the block's input, by a matrix and a bias
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def why_not_narrow(block: FFNBlock) -> str | None:
    """Why ``block`` cannot be cut to some of its neurons; None where it can."""
    if block.experts != 1 or any(linear.gathered or linear.packed for linear in block.linears()):
        return "its experts are packed in one weight"
    if block.quantized:
        return "its weights are stored as integers: run this pass before the one that quantizes"
    if block.overridable:
        return OVERRIDABLE
    if block.region.inner_norm:
        return "its neurons are normed together"
    if any(leaf.linear.fused_activation for leaf in block.region.leaves):
        return "its activation is fused into the projection: export without ONNX Runtime's own optimization"
    if any(leaf.linear.axis != block.axis for leaf in block.region.leaves):
        return "its features change their axis inside"
    if any(node.op == "Transpose" or node.op in NORMS for node in block.region.steps):
        return "its features change their axis inside"
    return None


def narrow(model: Model, block: FFNBlock, neurons: Indices, project: Project | None = None) -> gs.Tensor:
    """Add what computes ``h[..., neurons]`` from the block's input, and nothing that reads it yet.

    Args:
        neurons: ``[k]``, in the order wanted.
        project: adds a projection, given its leaf, its matrix ``[d_model, k]``, its bias and a name; None: as a plain linear.

    Returns:
        The value ``[*, k]`` (features on the block's axis).
    """
    values: dict[int, gs.Tensor] = {}
    for number, leaf in enumerate(block.region.leaves):
        values[id(leaf.tensor)] = _projection(model, block, leaf, neurons, f"leaf_{number}", project)
    for node in block.region.steps:
        if node.op in _RESHAPES:
            values[id(node.outputs[0])] = values[id(node.inputs[0])]
            continue
        inputs = [_input(model, block, tensor, values, neurons, alias=node.op in ALIASES and index > 0)
                  for index, tensor in enumerate(node.inputs)]
        build = Builder(model, block.graph, block.name)
        output = build.value("narrow")
        build.nodes(node.op, inputs, [output], domain=node.domain or "", hint=f"narrow_{node.op}", **_attributes(node))
        output.dtype = node.outputs[0].dtype
        values[id(node.outputs[0])] = output
    return values[id(block.region.output)]


def _attributes(node: gs.Node) -> dict[str, Any]:
    return dict(node.attrs)


def _projection(model: Model, block: FFNBlock, leaf: Leaf, neurons: Indices, hint: str,
                project: Project | None) -> gs.Tensor:
    linear = leaf.linear
    columns = neurons if leaf.columns is None else leaf.columns[neurons]
    weight = np.ascontiguousarray(linear.weight()[:, columns])
    bias = None if linear.bias is None else linear.bias()[columns]
    if project is not None:
        return project(leaf, weight, bias, hint)
    build = Builder(model, block.graph, block.name, linear.onnx_type)
    return build.linear(block.input, weight, bias, axis=block.axis, hint=hint)


def _input(model: Model, block: FFNBlock, tensor: gs.Tensor, values: dict[int, gs.Tensor], neurons: Indices, *,
           alias: bool) -> gs.Tensor:
    if id(tensor) in values:
        return values[id(tensor)]
    if not tensor.name or alias:
        return tensor
    folded = fold(tensor)
    assert folded is not None
    if int(np.prod(folded.shape, dtype=np.int64)) != block.d_ff or block.d_ff == 1:
        return tensor
    array = folded.load()
    axis = next(number for number, size in enumerate(array.shape) if size == block.d_ff)
    build = Builder(model, block.graph, block.name)
    return build.constant_as(np.take(array, neurons, axis=axis), folded.onnx_type, "narrow_constant")
