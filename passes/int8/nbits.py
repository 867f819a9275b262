"""Weights in blocks of 4 or 8 bits for ONNX Runtime's MatMulNBits (``quantize-ffn:form=nbits``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from ...graph.builder import Builder
from ...graph.linear import Linear
from ...graph.nbits import pack_nbits
from ...graph.weights import ComputedValues
from .integer_weight import IntegerWeight
from .weight_codes import Array

_INT8_ARITHMETIC = 4


def quantize_nbits(build: Builder, linear: Linear, weight: IntegerWeight, int8_arithmetic: bool) -> None:
    """Put a MatMulNBits, and an Add for the bias, in the place of ``linear``.

    Args:
        int8_arithmetic: quantize the activations too, one scale a row and block, where the kernel can (``accuracy_level`` 4).
    """
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
    rounding = weight.rounding
    assert rounding.block is not None
    d_in, d_out, bits, block = linear.d_in, linear.d_out, rounding.bits, rounding.block
    blocks = -(-d_in // block)

    def packed() -> Array:
        return pack_nbits(weight.codes(), bits, block)

    def make() -> tuple[object, ...]:
        stored = ComputedValues((d_out, blocks, block * bits // 8), onnx.TensorProto.UINT8, packed)
        return (build.constant(stored, f"{hint}_weight_int{bits}"),
                build.constant(np.ascontiguousarray(weight.scales.T).reshape(-1), f"{hint}_weight_scale"))

    codes, scales = weight.shared(build, "nbits", make)
    attributes: dict[str, Any] = {"accuracy_level": _INT8_ARITHMETIC} if int8_arithmetic else {}
    y = build.contrib("MatMulNBits", linear.input, codes, scales, hint=f"{hint}_int{bits}", K=d_in, N=d_out, bits=bits,
                      block_size=block, **attributes)
    weight.put(build, y, hint)
