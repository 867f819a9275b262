"""Which weights go into a data file, and where in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from .tensors import tensors
from .weights import StoredValues, Values, stub_key

_ALIGNMENT = 64  # bytes, so that memory can be mapped
_SMALLEST_OUTSIDE = 4096  # bytes; saying where a tensor lies takes about 90


@dataclass(frozen=True)
class Layout:
    """A model with part of its weights outside.

    Attributes:
        proto: the model, a copy.
        weights: each weight outside and its offset, in order.
        places: the tensors outside, their weights and offsets.
    """

    proto: onnx.ModelProto
    weights: list[tuple[int, Values]]
    places: list[tuple[onnx.TensorProto, Values, int]]

    def point(self, name: str) -> None:
        """Let the tensors outside say that they lie in the file called ``name``."""
        for tensor, weight, offset in self.places:
            del tensor.external_data[:]
            for key, value in (("location", name), ("offset", str(offset)), ("length", str(weight.nbytes))):
                tensor.external_data.add(key=key, value=value)


def lay_out(proto: onnx.ModelProto, values: Mapping[str, Values], limit: int) -> Layout:
    """Put the large initializers outside; values of attributes only where the ``.onnx`` would pass ``limit`` bytes else."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    layout, rest = _lay_out(model, values, False)
    return layout if rest + model.ByteSize() <= limit else _lay_out(model, values, True)[0]


def _lay_out(model: onnx.ModelProto, values: Mapping[str, Values], attributes_too: bool) -> tuple[Layout, int]:
    """The layout, and the bytes of the weights that stay inside."""
    layout = Layout(model, [], [])
    places: dict[object, int] = {}
    end = rest = 0
    for tensor, in_attribute in tensors(model):
        key = stub_key(tensor)
        if key is None:
            continue
        weight = values[key]
        if weight.nbytes < _SMALLEST_OUTSIDE or (in_attribute and not attributes_too):
            rest += weight.nbytes
            continue
        place = places.get(_identity(weight))
        if place is None:
            place = places[_identity(weight)] = -(-end // _ALIGNMENT) * _ALIGNMENT
            layout.weights.append((place, weight))
            end = place + weight.nbytes
        layout.places.append((tensor, weight, place))
    return layout, rest


def _identity(weight: Values) -> object:
    """Equal for weights that are the same bytes of the same file, or the same object."""
    if isinstance(weight, StoredValues):
        return (str(weight.source.path), weight.offset, weight.nbytes)
    return id(weight)
