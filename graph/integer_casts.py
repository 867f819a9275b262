"""The Casts around products of integers in a model of half precision, which are part of the linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnx

from .edit import consumers, producer
from .types import numpy_type

if TYPE_CHECKING:
    from .linear import Linear

Array = npt.NDArray[Any]
_HALVES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})


def absorb_casts(linear: Linear) -> None:
    """Take the Casts around integer products, which give float32 only, as theirs: input and output are of the narrower type."""
    before, readers = producer(linear.input), consumers(linear.output)
    after = readers[0] if len(readers) == 1 and readers[0].op == "Cast" else None
    if before is None or before.op != "Cast" or after is None or before.attrs.get("to") != onnx.TensorProto.FLOAT:
        return
    narrow, source = int(after.attrs["to"]), before.inputs[0]
    if narrow not in _HALVES or source.dtype not in (None, narrow):
        return
    linear.weight, linear.bias = _as(linear.weight, narrow), None if linear.bias is None else _as(linear.bias, narrow)
    linear.nodes = [before, *linear.nodes, after]
    linear.input, linear.output, linear.onnx_type = source, after.outputs[0], narrow


def _as(load: Callable[[], Array], onnx_type: int) -> Callable[[], Array]:
    return lambda: load().astype(numpy_type(onnx_type))
