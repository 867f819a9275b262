"""int8 weights that are multiplied in float (``quantize-ffn:form=weight-only``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.constant import Folded, fold
from ...graph.edit import producer, remove_dead, set_input, take_over
from ...graph.linear import Linear
from ...graph.weights import ComputedValues
from .integer_weight import IntegerWeight
from .weight_codes import Array

_FLOAT = onnx.TensorProto.FLOAT


def dequantize_matrix(build: Builder, linear: Linear, weight: IntegerWeight) -> None:
    """``x · DequantizeLinear(W) + b``, the form that ONNX Runtime (1.25 on) turns into MatMulNBits."""
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind

    def make() -> tuple[gs.Constant, ...]:
        stored = ComputedValues(weight.shape, onnx.TensorProto.INT8, weight.codes)
        return (build.constant(stored, f"{hint}_int8"),)

    # Where ONNX Runtime 1.32 makes MatMulNBits of it, it looks for the weight in the same graph only, and fails.
    (stored,) = weight.shared(build, "weight-only", make, inner=True)
    block = weight.rounding.block
    matrix = _dequantized(build, stored, weight.scales if block else weight.scales.reshape(-1), 0 if block else 1, hint, block)
    y: gs.Tensor = build.op("MatMul", linear.input, matrix, hint=hint)
    weight.put(build, y, hint)


@dataclass(frozen=True)
class StoredWeight:
    """A weight that keeps the shape it is stored in: a convolution's, or experts in one tensor.

    Attributes:
        folded: the weight; axis: where d_in is in it; scales: along that axis 1; gather: picks experts from it, or None.
    """

    folded: Folded
    axis: int
    scales: Array
    gather: gs.Node | None


def stored_weight(linear: Linear, largest: int) -> StoredWeight | str:
    """What ``dequantize_stored`` needs, or why it cannot be done."""
    index = 0 if linear.input is not linear.node.inputs[0] and linear.kind == "MatMul" else 1
    gather = _gather(linear.node.inputs[index]) if linear.gathered else None
    if linear.gathered and gather is None:
        return "its weights are picked in a way that is not known"
    folded = fold(gather.inputs[0] if gather is not None else linear.node.inputs[index])
    if folded is None:
        return "its weight is not a constant"
    axis = 1 if linear.kind in ("Conv", "FusedConv") else (len(folded.shape) - 2 if index == 1 else len(folded.shape) - 1)
    if folded.shape[axis] != linear.d_in:
        axis = 2 * len(folded.shape) - 3 - axis
    scales = _column_scales(folded.load(), axis, largest)
    return "a weight is not finite" if scales is None else StoredWeight(folded, axis, scales, gather)


def _column_scales(weight: Array, axis: int, largest: int) -> Array | None:
    """``s = max |W| / largest`` along ``axis`` (kept as 1), float32; 1 for a column of zeros; None if not finite."""
    top = np.abs(weight).max(axis=axis, keepdims=True).astype(np.float32)
    if not np.isfinite(top).all():
        return None
    return np.where(top > 0, top / np.float32(largest), np.float32(1))


def _gather(tensor: gs.Tensor) -> gs.Node | None:
    node = producer(tensor)
    while node is not None and node.op in ("Identity", "Cast"):
        node = producer(node.inputs[0])
    return node if node is not None and node.op in ("Gather", "GatherND") else None


def dequantize_stored(build: Builder, linear: Linear, weight: StoredWeight, largest: int) -> None:
    """Dequantize a weight where it is read; of packed experts only those gathered."""
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
    folded, axis, scales, gather = weight.folded, weight.axis, weight.scales, weight.gather

    def codes() -> Array:
        return np.clip(np.rint(folded.load().astype(np.float32) / scales), -largest, largest).astype(np.int8)

    stored = build.constant(ComputedValues(folded.shape, onnx.TensorProto.INT8, codes), f"{hint}_int8")
    if gather is not None:
        attrs = dict(gather.attrs)
        whole = build.op(gather.op, stored, gather.inputs[1], hint=f"{hint}_experts", **attrs)
        picked = build.op(gather.op, build.constant_as(scales, _FLOAT, f"{hint}_scale"), gather.inputs[1],
                          hint=f"{hint}_experts_scale", **attrs)
        take_over(gather.outputs[0], _multiplied(build, whole, picked, folded.onnx_type, hint))
        remove_dead(build.graph, [gather])
        return
    kept = [i for i in range(len(folded.shape)) if i != axis and scales.shape[i] > 1]
    if len(kept) == 1 and build.model.opset >= 13:
        value: gs.Tensor = _dequantized(build, stored, scales.reshape(-1), kept[0], hint)
    else:
        value = _multiplied(build, stored, build.constant_as(scales, _FLOAT, f"{hint}_scale"), folded.onnx_type, hint)
    index = next(i for i, each in enumerate(linear.node.inputs) if each is not linear.input)
    old = producer(linear.node.inputs[index])
    set_input(linear.node, index, value)
    remove_dead(build.graph, [old] if old is not None else [])


def _multiplied(build: Builder, codes: gs.Tensor, scales: gs.Tensor, onnx_type: int, hint: str) -> gs.Tensor:
    value = build.op("Mul", build.op("Cast", codes, to=_FLOAT), scales, hint=f"{hint}_dequantized")
    return value if onnx_type == _FLOAT else build.op("Cast", value, to=onnx_type)


def _dequantized(build: Builder, stored: gs.Constant, scales: Array, axis: int, hint: str,
                 block: int | None = None) -> gs.Tensor:
    """``stored`` as float, by DequantizeLinear where the opset has one per column, else by Cast and Mul."""
    if build.model.opset < 13:
        whole = build.op("Cast", stored, to=_FLOAT)
        weight = build.op("Mul", whole, build.constant_as(scales, _FLOAT, f"{hint}_scale"), hint=f"{hint}_dequantized")
    else:
        kind = build.onnx_type if build.model.opset >= 19 else _FLOAT
        sizes: dict[str, Any] = {"block_size": block} if block else {}
        weight = build.op("DequantizeLinear", stored, build.constant_as(scales, kind, f"{hint}_scale"),
                          hint=f"{hint}_dequantized", axis=axis, **sizes)
        if kind == build.onnx_type:
            return weight
    return weight if build.onnx_type == _FLOAT else build.op("Cast", weight, to=build.onnx_type)
