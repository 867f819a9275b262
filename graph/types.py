"""ONNX element types and what NumPy (with ml_dtypes) calls them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE})


def numpy_type(onnx_type: int) -> np.dtype[Any]:
    """The array type for ``onnx_type``: NumPy's own, or ml_dtypes' for bfloat16, float8 and the 4-bit types."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))


def onnx_type_of(dtype: np.dtype[Any]) -> int:
    """The ``TensorProto.DataType`` of an array type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
