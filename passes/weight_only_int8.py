"""int8 weights that are multiplied in float (``quantize-ffn:form=weight-only``)."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.constant import Folded, fold
from ..graph.edit import producer, remove_dead, set_input, take_over
from ..graph.ffn import FFNBlock
from ..graph.linear import Linear
from ..graph.model import Model
from .base import Refused, Rewritten
from .int8 import column_scales, quantized

_FLOAT = onnx.TensorProto.FLOAT
Array = npt.NDArray[Any]


def quantize_weights(model: Model, block: FFNBlock, largest: int) -> Rewritten | Refused:
    """Put dequantized int8 weights in the place of the float ones.

    A matrix is re-emitted ``[d_in, d_out]`` behind DequantizeLinear, the form that ONNX Runtime turns into MatMulNBits;
    a convolution keeps its node; of packed experts only those gathered are dequantized.
    """
    build = Builder(model, block.graph, block.name, block.onnx_type)
    jobs = []
    for linear in block.linears():
        job = _prepare(linear, largest)
        if isinstance(job, str):
            return Refused(job, linear.output.name)
        jobs.append((linear, *job))
    for linear, folded, axis, scales, gather in jobs:
        _emit(build, linear, folded, axis, scales, gather, largest)
    return Rewritten()


def _prepare(linear: Linear, largest: int) -> tuple[Folded | None, int, Array, gs.Node | None] | str:
    """The stored weight, the axis of d_in in it, its scales, and the Gather that picks experts from it."""
    if linear.axis == -1 and linear.experts == 1 and not linear.gathered:
        scales = column_scales(linear.weight(), 0, largest)
        return "a weight is not finite" if scales is None else (None, 0, scales, None)
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
    scales = column_scales(folded.load(), axis, largest)
    return "a weight is not finite" if scales is None else (folded, axis, scales, gather)


def _gather(tensor: gs.Tensor) -> gs.Node | None:
    node = producer(tensor)
    while node is not None and node.op in ("Identity", "Cast"):
        node = producer(node.inputs[0])
    return node if node is not None and node.op in ("Gather", "GatherND") else None


def _emit(build: Builder, linear: Linear, folded: Folded | None, axis: int, scales: Array, gather: gs.Node | None,
          largest: int) -> None:
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
    if folded is None:
        shape = (linear.d_in, linear.d_out)
        weight = _dequantized(build, build.constant(quantized(linear.weight, scales, shape, largest), f"{hint}_int8"),
                              scales, 1, hint)
        y: gs.Tensor = build.op("MatMul", linear.input, weight, hint=hint)
        if linear.bias is not None:
            y = build.op("Add", y, build.constant(linear.bias(), f"{hint}_bias"), hint=f"{hint}_add")
        old = producer(linear.output)
        take_over(linear.output, y)
        remove_dead(build.graph, [old] if old is not None else [])
        return
    stored = build.constant(quantized(folded.load, scales, folded.shape, largest), f"{hint}_int8")
    if gather is not None:
        attrs = dict(gather.attrs)
        whole = build.op("Cast", build.op(gather.op, stored, gather.inputs[1], hint=f"{hint}_experts", **attrs), to=_FLOAT)
        picked = build.op(gather.op, build.constant_as(scales, _FLOAT, f"{hint}_scale"), gather.inputs[1],
                          hint=f"{hint}_experts_scale", **attrs)
        weight = build.op("Mul", whole, picked, hint=f"{hint}_dequantized")
        if folded.onnx_type != _FLOAT:
            weight = build.op("Cast", weight, to=folded.onnx_type)
        old = gather
        take_over(gather.outputs[0], weight)
        remove_dead(build.graph, [old])
        return
    kept = [i for i in range(len(folded.shape)) if i != axis and scales.shape[i] > 1]
    if len(kept) == 1 and build.model.opset >= 13:
        weight = _dequantized(build, stored, scales, kept[0], hint)
    else:
        weight = build.op("Mul", build.op("Cast", stored, to=_FLOAT), build.constant_as(scales, _FLOAT, f"{hint}_scale"),
                          hint=f"{hint}_dequantized")
        if folded.onnx_type != _FLOAT:
            weight = build.op("Cast", weight, to=folded.onnx_type)
    index = next(i for i, value in enumerate(linear.node.inputs) if value is not linear.input)
    old = producer(linear.node.inputs[index])
    set_input(linear.node, index, weight)
    remove_dead(build.graph, [old] if old is not None else [])


def _dequantized(build: Builder, stored: gs.Constant, scales: Array, axis: int, hint: str) -> gs.Tensor:
    """``stored`` as float, by DequantizeLinear where the opset has one per column, else by Cast and Mul."""
    if build.model.opset < 13:
        whole = build.op("Cast", stored, to=_FLOAT)
        weight = build.op("Mul", whole, build.constant_as(scales, _FLOAT, f"{hint}_scale"), hint=f"{hint}_dequantized")
    else:
        kind = build.onnx_type if build.model.opset >= 19 else _FLOAT
        weight = build.op("DequantizeLinear", stored, build.constant_as(scales.reshape(-1), kind, f"{hint}_scale"),
                          hint=f"{hint}_dequantized", axis=axis)
        if kind == build.onnx_type:
            return weight
    return weight if build.onnx_type == _FLOAT else build.op("Cast", weight, to=build.onnx_type)
