"""Arrays to and from ``OrtValue``, without copies where ONNX Runtime allows it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..graph.types import bits_of, numpy_type
from ..graph.weights import StoredValues, Values
from .onnx_runtime import onnx_runtime

Array = npt.NDArray[Any]


def is_foreign(onnx_type: int) -> bool:
    """Whether NumPy itself has no such type (bfloat16, float8, 4-bit), so that ONNX Runtime's NumPy calls refuse it."""
    return onnx_type not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING) and numpy_type(onnx_type).isbuiltin != 1


def weight_value(values: Values) -> Any:
    """An ``OrtValue`` on the CPU over a weight: over the file itself where it lies in one, else over a fresh array."""
    if 0 < bits_of(values.onnx_type) < 8:
        return _packed_value(values)
    return array_value(values.memmap() if isinstance(values, StoredValues) else values.load(), values.onnx_type)


def array_value(array: Array, onnx_type: int) -> Any:
    """An ``OrtValue`` on the CPU over ``array``, which it keeps alive. No copy unless the array is not contiguous."""
    ort_value = onnx_runtime().OrtValue
    array = np.ascontiguousarray(array) if array.ndim else array
    if not is_foreign(onnx_type):
        return ort_value.ortvalue_from_numpy(array)
    return ort_value.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.dtype.itemsize}"), onnx_type)


def device_value(array: Array, onnx_type: int, device: str) -> Any:
    """An ``OrtValue`` with what ``array`` holds, on ``device``: ``cpu`` (over the array itself) or ``cuda``."""
    if device == "cpu":
        return array_value(array, onnx_type)
    ort_value = onnx_runtime().OrtValue
    if not is_foreign(onnx_type):
        return ort_value.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
    there = ort_value.ortvalue_from_shape_and_type(list(array.shape), onnx_type, device, 0)
    there.update_inplace(np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}"))
    return there


def to_array(value: Any) -> Array:
    """The tensor in an ``OrtValue`` that lies on the CPU; a copy for types that NumPy lacks."""
    if not is_foreign(value.element_type()):
        return np.asarray(value.numpy())
    dtype = numpy_type(value.element_type())
    if not value.tensor_size_in_bytes():
        return np.zeros(value.shape(), dtype)
    held = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    if bits_of(value.element_type()) < 8:
        packed = onnx.TensorProto(dims=value.shape(), data_type=value.element_type(), raw_data=bytes(held))
        return np.array(onnx.numpy_helper.to_array(packed))
    return np.frombuffer(held, dtype).reshape(value.shape()).copy()


def _packed_value(values: Values) -> Any:
    """4-bit types: ONNX Runtime wants a buffer of the user's and takes its shape for the tensor's, a byte to an element.

    Only the first half of that buffer is written and read, so only half of it is ever in memory.
    """
    buffer = np.empty(values.shape, np.uint8)
    flat, position = buffer.reshape(-1), 0
    for tile in values.tiles():
        flat[position:position + len(tile)] = np.frombuffer(tile, np.uint8)
        position += len(tile)
    return onnx_runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(buffer, values.onnx_type)
