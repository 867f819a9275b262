"""Weights in 16 bits, a tile at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ...graph.types import numpy_type
from ...graph.weights import ComputedValues, InlineValues, Values

Array = npt.NDArray[Any]
LARGEST = 65504.0  # of the finite numbers of float16
_SMALL = 1 << 10  # numbers; below, converted at once
_ROWS = 1 << 22  # numbers looked at together


def half_values(values: Values, onnx_type: int) -> Values:
    """``values`` in ``onnx_type``. In float16 numbers beyond 65504 become ±65504; infinities stay."""

    def to_half(array: Array) -> Array:
        if onnx_type == onnx.TensorProto.FLOAT16:
            array = np.where(np.isfinite(array), np.clip(array, -LARGEST, LARGEST), array)
        half: Array = array.astype(numpy_type(onnx_type))
        return half

    if values.size <= _SMALL:
        return InlineValues(to_half(values.load()))
    return ComputedValues(values.shape, onnx_type, lambda: to_half(values.load()),
                          (lambda start, stop: to_half(values.rows(start, stop))) if values.shape else None)


def beyond(values: Values) -> int:
    """How many finite numbers of ``values`` float16 cannot hold."""
    if not values.shape or values.size <= _ROWS:
        return _count(values.load())
    step = max(1, _ROWS // (values.size // values.shape[0]))
    return sum(_count(values.rows(start, min(start + step, values.shape[0]))) for start in range(0, values.shape[0], step))


def _count(array: Array) -> int:
    return int((np.isfinite(array) & (np.abs(array) > LARGEST)).sum())
