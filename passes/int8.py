"""Weights as int8 with one scale per output column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..graph.weights import ComputedValues

Array = npt.NDArray[Any]


def column_scales(weight: Array, axis: int, largest: int = 127) -> Array | None:
    """``s = max |W| / largest`` along ``axis`` (kept as 1), float32; 1 for a column of zeros; None if not finite."""
    top = np.abs(weight).max(axis=axis, keepdims=True).astype(np.float32)
    if not np.isfinite(top).all():
        return None
    scales = top / np.float32(largest)
    return np.where(scales > 0, scales, np.float32(1))


def quantized(load: Callable[[], Array], scales: Array, shape: tuple[int, ...], largest: int = 127) -> ComputedValues:
    """``round(W / s)`` as int8 of ``shape``, computed when it is written."""

    def compute() -> Array:
        return np.clip(np.rint(load().astype(np.float32) / scales), -largest, largest).astype(np.int8).reshape(shape)

    return ComputedValues(shape, onnx.TensorProto.INT8, compute)
