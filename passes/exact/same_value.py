"""Whether two values are the same because they are computed in the same way: for sizes, which exporters compute over and over."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ...graph.constant import Folded, fold, small
from ...graph.edit import producer
from ...graph.linear import read_linear

_DEPTH = 12


def same_value(one: gs.Tensor, other: gs.Tensor, depth: int = _DEPTH) -> bool:
    """Whether ``one`` and ``other`` surely hold the same numbers."""
    if one is other:
        return True
    first, second = fold(one), fold(other)
    if first is not None or second is not None:
        return first is not None and second is not None and _same_constant(first, second)
    a, b = producer(one), producer(other)
    if a is None or b is None or depth == 0 or (a.op, a.domain) != (b.op, b.domain) or a.domain or a.op not in _SIZES:
        return False
    if a.attrs != b.attrs or len(a.inputs) != len(b.inputs):
        return False
    if a.op == "Gather" and (place := _place(a)) is not None and place == _place(b):
        return _measured(a, place) is _measured(b, place)
    return all(same_value(x, y, depth - 1) for x, y in zip(a.inputs, b.inputs, strict=True))


def _same_constant(first: Folded, second: Folded) -> bool:
    if first.overridable or second.overridable or first.shape != second.shape or first.onnx_type != second.onnx_type:
        return False
    return int(np.prod(first.shape)) <= 64 and np.array_equal(first.load(), second.load())


_SIZES = frozenset({"Shape", "Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Slice", "Mul", "Add", "Div", "Identity"})


def _place(node: gs.Node) -> int | None:
    """Which size of a value's shape ``node`` picks, if it is the first or second."""
    shape, index = producer(node.inputs[0]), small(node.inputs[1], 1)
    if shape is None or shape.op != "Shape" or shape.attrs or index is None:
        return None
    place = int(index.reshape(()))
    return place if place in (0, 1) else None


def _measured(node: gs.Node, place: int) -> gs.Tensor:
    """The value whose size ``node`` picks; x where that is a linear of x, which has the same size there."""
    tensor = producer(node.inputs[0]).inputs[0]  # type: ignore[union-attr]
    maker = producer(tensor)
    for source in [maker, *map(producer, maker.inputs)] if maker is not None else []:
        linear = read_linear(source) if source is not None else None
        if linear is not None and linear.output is tensor and linear.kind == "MatMul" and (
                place == 0 or linear.d_in == linear.d_out):
            return linear.input
    return tensor
