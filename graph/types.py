"""ONNX element types and what NumPy (with ml_dtypes) calls them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16,
                    onnx.TensorProto.DOUBLE})


def numpy_type(onnx_type: int) -> np.dtype[Any]:
    """The array type for ``onnx_type``: NumPy's own, or ml_dtypes' for bfloat16, float8 and the 4-bit types."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))


def onnx_type_of(dtype: np.dtype[Any]) -> int:
    """The ``TensorProto.DataType`` of an array type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def bits_of(onnx_type: int) -> int:
    """Bits that one element takes as stored; 0 for strings and for types not known here."""
    return _BITS.get(onnx_type, 0)


_KIND = onnx.TensorProto
_BITS: dict[int, int] = {
    _KIND.FLOAT: 32, _KIND.UINT8: 8, _KIND.INT8: 8, _KIND.UINT16: 16, _KIND.INT16: 16, _KIND.INT32: 32, _KIND.INT64: 64,
    _KIND.BOOL: 8, _KIND.FLOAT16: 16, _KIND.DOUBLE: 64, _KIND.UINT32: 32, _KIND.UINT64: 64, _KIND.COMPLEX64: 64,
    _KIND.COMPLEX128: 128, _KIND.BFLOAT16: 16,
    **dict.fromkeys(range(17, 21), 8),  # float8 in four forms
    **dict.fromkeys(range(21, 24), 4),  # uint4, int4, float4e2m1
    24: 8, 25: 2, 26: 2, 27: 6, 28: 6,  # float8e8m0, uint2, int2, float6 in two forms, packed
}
