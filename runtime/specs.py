"""What a model takes in and gives out: name, type and shape of each value."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..graph.model import Model
from ..graph.types import numpy_type

Array = npt.NDArray[Any]
Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class ValueSpec:
    """A value at the edge of a model.

    Attributes:
        name: its name.
        onnx_type: its type as ONNX Runtime writes it: ``tensor(float)``, ``seq(tensor(int64))``, ``optional(...)``.
        shape: a number, a symbolic name, or None for each dimension; None where the rank is unknown. ONNX Runtime
            does not tell a scalar from an unknown rank, so a spec read from a session has None for both.
    """

    name: str
    onnx_type: str
    shape: Shape | None

    @property
    def is_tensor(self) -> bool:
        """A tensor, not a sequence, map or optional."""
        return self.onnx_type.startswith("tensor(")

    @property
    def element_type(self) -> int:
        """``TensorProto.DataType`` of the elements, of whatever holds them."""
        return _ELEMENT_TYPES.get(re.sub(r".*\(|\).*", "", self.onnx_type), onnx.TensorProto.UNDEFINED)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Array type of the elements; ml_dtypes' for bfloat16, float8 and 4-bit types; object for strings."""
        kind = self.element_type
        return np.dtype(object) if kind in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING) else numpy_type(kind)

    @property
    def floating(self) -> bool:
        """Whether it is a tensor of floating-point numbers."""
        return self.is_tensor and self.element_type in _FLOATING

    @property
    def shape_text(self) -> str:
        """The shape for people: ``[batch, 128]``."""
        if self.shape is None:
            return "any shape"
        return "[" + ", ".join("?" if dim is None else str(dim) for dim in self.shape) + "]"


@dataclass(frozen=True)
class InputSpec(ValueSpec):
    """An input of a model.

    Attributes:
        optional: a feed may leave it out: it has an optional type, or an initializer gives its default.
    """

    optional: bool = False


def input_specs(model: Model) -> tuple[InputSpec, ...]:
    """The inputs of ``model`` as it stands, without a session."""
    proto, _ = model.to_proto()
    defaults = {tensor.name for tensor in proto.graph.initializer}
    return tuple(InputSpec(info.name, type_text(info.type), _shape_of(info.type),
                           info.name in defaults or info.type.HasField("optional_type"))
                 for info in proto.graph.input)


def specs_of(arguments: Iterable[Any]) -> Iterable[tuple[str, str, Shape | None]]:
    """Name, type and shape of each ``onnxruntime.NodeArg``."""
    for argument in arguments:
        dims = list(argument.shape)
        shape = tuple(dim if isinstance(dim, int) and dim >= 0 else dim or None if isinstance(dim, str) else None
                      for dim in dims)
        yield argument.name, argument.type, shape or None


def type_text(proto: onnx.TypeProto) -> str:
    """``proto`` as ONNX Runtime writes it."""
    if proto.HasField("sequence_type"):
        return f"seq({type_text(proto.sequence_type.elem_type)})"
    if proto.HasField("optional_type"):
        return f"optional({type_text(proto.optional_type.elem_type)})"
    if proto.HasField("tensor_type"):
        return f"tensor({_TYPE_NAMES.get(proto.tensor_type.elem_type, 'undefined')})"
    return "unknown"


def _shape_of(proto: onnx.TypeProto) -> Shape | None:
    if proto.HasField("optional_type"):
        return _shape_of(proto.optional_type.elem_type)
    if not proto.HasField("tensor_type") or not proto.tensor_type.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                 for dim in proto.tensor_type.shape.dim)


_TYPE_NAMES = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
_ELEMENT_TYPES = {name: number for number, name in _TYPE_NAMES.items()}
_FLOATING = {number for name, number in _ELEMENT_TYPES.items() if "float" in name or name == "double"}
