"""A weight times one number for each feature of its input, computed a tile at a time when it is written."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ...graph.constant import Folded
from ...graph.weights import ComputedValues, Values

Array = npt.NDArray[Any]


def scaled_weight(weight: Folded, scale: Array, axis: int) -> ComputedValues:
    """``weight`` (2-D) with index i of ``axis`` multiplied by ``scale[i]``, in float64, rounded to the weight's type."""
    column = scale.reshape(-1, 1) if axis == 0 else scale.reshape(1, -1)

    def compute() -> Array:
        product: Array = weight.load() * column
        return product

    stored: Values | None = weight.sources[0]._values if not weight.nodes and weight.sources else None
    if stored is None or not stored.by_rows:
        return ComputedValues(weight.shape, weight.onnx_type, compute)

    def rows(start: int, stop: int) -> Array:
        product: Array = stored.rows(start, stop) * (column[start:stop] if axis == 0 else column)
        return product

    return ComputedValues(weight.shape, weight.onnx_type, compute, rows)
