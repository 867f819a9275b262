"""Integer kernels with activations quantized at run time (``quantize-ffn:form=dynamic``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.edit import producer, remove_dead, take_over
from ..graph.ffn import FFNBlock
from ..graph.linear import Linear
from ..graph.model import Model
from .base import Refused, Rewritten
from .int8 import column_scales, quantized

_FLOAT = onnx.TensorProto.FLOAT
_SMALLEST_ROW = 1e-12  # so that a row of zeros divides by something
_NEVER_BELOW = {"gelu": 0.28, "gelu_tanh": 0.28, "quick_gelu": 0.28, "silu": 0.28, "relu": _SMALLEST_ROW,
                "relu2": _SMALLEST_ROW, "sigmoid": _SMALLEST_ROW, "softplus": _SMALLEST_ROW}

Array = npt.NDArray[Any]


def quantize_block(model: Model, block: FFNBlock, row_scale: bool, largest: int,
                   made: dict[object, tuple[gs.Constant, gs.Constant]]) -> Rewritten | Refused:
    """Put integer products in the place of the linears of ``block``.

    Args:
        row_scale: divide each row of the activations by its largest magnitude first.
        largest: magnitude of the largest weight, 127 or 63.
        made: int8 weights made so far, so that shared ones stay shared.
    """
    build = Builder(model, block.graph, block.name, block.onnx_type)
    weights = {}
    for linear in block.linears():
        pair = _weight(build, linear, largest, made)
        if pair is None:
            return Refused("a weight is not finite", linear.output.name)
        weights[id(linear)] = pair
    groups: dict[int, list[Linear]] = {}
    for linear in block.linears():
        groups.setdefault(id(linear.input), []).append(linear)
    for linears in groups.values():
        behind = linears[0] is block.down.linear
        floor = None
        if behind and not block.gated and not block.region.inner_norm and block.activation.scale == 1:
            floor = _NEVER_BELOW.get(block.activation.name)
        _replace(build, linears, weights, row_scale, floor)
    return Rewritten()


def _weight(build: Builder, linear: Linear, largest: int,
            made: dict[object, tuple[gs.Constant, gs.Constant]]) -> tuple[gs.Constant, gs.Constant] | None:
    key = (linear.weight_key, "dynamic", id(build.graph)) if linear.weight_key is not None else None
    if key is not None and key in made:
        return made[key]
    scales = column_scales(linear.weight(), 0, largest)
    if scales is None:
        return None
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
    pair = (build.constant(quantized(linear.weight, scales, (linear.d_in, linear.d_out), largest), f"{hint}_weight_int8"),
            build.constant_as(scales.reshape(-1), _FLOAT, f"{hint}_weight_scale"))
    if key is not None:
        made[key] = pair
    return pair


def _replace(build: Builder, linears: list[Linear], weights: dict[int, tuple[gs.Constant, gs.Constant]], row_scale: bool,
             floor: float | None) -> None:
    """Linears that read one value, from one quantization of it."""
    x = linears[0].input
    if build.onnx_type != _FLOAT:
        x = build.op("Cast", x, to=_FLOAT)
    rows = None
    if row_scale:
        rows = _row_maximum(build, x, floor)
        x = build.op("Div", x, rows, hint="row_scaled")
    whole, scale, zero = build.value("int8"), build.value("int8_scale"), build.value("int8_zero_point")
    build.nodes("DynamicQuantizeLinear", [x], [whole, scale, zero])
    for linear in linears:
        weight, columns = weights[id(linear)]
        hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
        product = build.op("Cast", build.op("MatMulInteger", whole, weight, zero, hint=f"{hint}_int8"), to=_FLOAT)
        y = build.op("Mul", product, build.op("Mul", scale, columns, hint=f"{hint}_scale"), hint=f"{hint}_dequantized")
        if rows is not None:
            y = build.op("Mul", y, rows, hint=f"{hint}_rows")
        if linear.bias is not None:
            bias = linear.bias().astype(np.float32)
            y = build.op("Add", y, build.constant_as(bias, _FLOAT, f"{hint}_bias"), hint=f"{hint}_add")
        if build.onnx_type != _FLOAT:
            y = build.op("Cast", y, to=build.onnx_type)
        old = producer(linear.output)
        take_over(linear.output, y)
        remove_dead(build.graph, [old] if old is not None else [])


def _row_maximum(build: Builder, x: gs.Tensor, floor: float | None) -> gs.Tensor:
    """``max |x|`` of each row, or ``max(max x, floor)`` where no x is below −floor."""
    if floor is None:
        return build.op("Max", build.reduce_max(build.op("Abs", x), -1, "row_maximum"),
                        build.constant_as(np.asarray(_SMALLEST_ROW), _FLOAT, "row_floor"), hint="row_scale")
    return build.op("Max", build.reduce_max(x, -1, "row_maximum"),
                    build.constant_as(np.asarray(floor), _FLOAT, "row_floor"), hint="row_scale")
