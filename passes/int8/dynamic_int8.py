"""Integer products of activations that are quantized at run time (``quantize-ffn:form=dynamic``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.edit import producer, remove_dead, take_over
from ...graph.linear import Linear
from ...graph.model import Model
from ...graph.weights import InlineValues
from .integer_weight import IntegerWeight
from .linear_groups import LinearGroup

_FLOAT = onnx.TensorProto.FLOAT
_SMALLEST_ROW = 1e-12  # so that a row of zeros divides by something
_BELOW_ZERO = 32  # of 256 codes, for values that go a little below zero


@dataclass(frozen=True)
class _Codes:
    """Where the codes of a row lie: x = scale · row · (q − zero), row = max(largest of the row, floor)."""

    zero: int
    scale: float
    floor: float


def quantize_group(model: Model, group: LinearGroup, weights: Sequence[IntegerWeight], rows: bool) -> None:
    """Put integer products in the place of the linears of ``group``, which share one quantization of what they read.

    Args:
        weights: one for each linear.
        rows: each row of the activations has a scale of its own.
    """
    build = Builder(model, group.graph, group.name, group.onnx_type)
    x = group.input if group.onnx_type == _FLOAT else build.op("Cast", group.input, to=_FLOAT)
    quantized = _by_row(build, x, group) if rows else _by_tensor(build, x)
    for linear, weight in zip(group.linears, weights, strict=True):
        _multiply(build, linear, weight, quantized)


@dataclass(frozen=True)
class _Quantized:
    """Codes of x, their zero point and scale, and what each row is multiplied by behind the product (None: nothing)."""

    codes: gs.Tensor
    zero: gs.Tensor
    scale: gs.Tensor
    rows: gs.Tensor | None


def _by_tensor(build: Builder, x: gs.Tensor) -> _Quantized:
    codes, scale, zero = build.value("int8"), build.value("int8_scale"), build.value("int8_zero_point")
    build.nodes("DynamicQuantizeLinear", [x], [codes, scale, zero])
    return _Quantized(codes, zero, scale, None)


def _by_row(build: Builder, x: gs.Tensor, group: LinearGroup) -> _Quantized:
    """One scale a row, found by one reduction; the codes then need no search for the smallest and the largest number.

    Since x / r lies in a range that is known, its quantization is a constant. From opset 21 on, QuantizeLinear takes a scale for
    each row itself.
    """
    form = _codes(group.lowest)
    magnitude = x if group.lowest is not None else build.op("Abs", x)
    largest = build.reduce_max(magnitude, -1, "row_maximum")
    rows = build.op("Max", largest, build.constant_as(np.asarray(form.floor), _FLOAT, "row_floor"), hint="row_scale")
    zero = build.constant(np.asarray(form.zero, np.uint8), "row_zero_point")
    step = build.constant_as(np.asarray(form.scale), _FLOAT, "row_step")
    if build.model.opset < 21:
        codes = build.op("QuantizeLinear", build.op("Div", x, rows), step, zero, hint="row_int8")
        return _Quantized(codes, zero, step, rows)
    scales = build.op("Mul", rows, step, hint="row_scale_of_codes")
    zeros = build.op("ConstantOfShape", build.op("Shape", scales, hint="row_shape"), hint="row_zero_points",
                     value=gs.Constant("", InlineValues(np.asarray([form.zero], np.uint8))))
    codes = build.op("QuantizeLinear", x, scales, zeros, hint="row_int8", axis=-1, block_size=group.d_in)
    return _Quantized(codes, zero, build.constant_as(np.asarray(1.0), _FLOAT, "row_one"), scales)


def _codes(lowest: float | None) -> _Codes:
    """The whole range of uint8 for signed rows; most of it for the positive side where little is below zero."""
    if lowest is None:
        return _Codes(128, 1 / 127, _SMALLEST_ROW)
    if lowest == 0:
        return _Codes(0, 1 / 255, _SMALLEST_ROW)
    above = 255 - _BELOW_ZERO
    return _Codes(_BELOW_ZERO, 1 / above, lowest * above / _BELOW_ZERO)


def _multiply(build: Builder, linear: Linear, weight: IntegerWeight, x: _Quantized) -> None:
    """Written so that ONNX Runtime makes one DynamicQuantizeMatMul or MatMulIntegerToFloat of it, bias included.

    With a scale for each row it is written as MatMulIntegerToFloat at once: all its scales are constants, so that ONNX Runtime
    would fold them before it looks for the pattern.
    """
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
    codes, scales = weight.constants(build, hint)
    if x.rows is None:
        whole = build.op("MatMulInteger", x.codes, codes, x.zero, hint=f"{hint}_int8")
        y = build.op("Mul", build.op("Cast", whole, to=_FLOAT), build.op("Mul", x.scale, scales, hint=f"{hint}_scale"),
                     hint=f"{hint}_dequantized")
    else:
        y = build.contrib("MatMulIntegerToFloat", x.codes, codes, x.scale, scales, x.zero, hint=f"{hint}_int8")
        y = build.op("Mul", y, x.rows, hint=f"{hint}_rows")
    bias = weight.bias()
    if bias is not None:
        y = build.op("Add", y, build.constant_as(bias, _FLOAT, f"{hint}_bias"), hint=f"{hint}_add")
    if build.onnx_type != _FLOAT:
        y = build.op("Cast", y, to=build.onnx_type)
    old = producer(linear.output)
    take_over(linear.output, y)
    remove_dead(build.graph, [old] if old is not None else [])
