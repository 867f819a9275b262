"""Whole numbers that exporters compute from the size of the axis that is cut: bounds of a Slice, sizes of a Split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from .constant import integers
from .edit import producer

_DEPTH = 16


@dataclass(frozen=True)
class FeatureAxis:
    """The axis of ``value`` that holds the features, counted from the end, and how many there are."""

    value: gs.Tensor
    axis: int
    width: int

    def holds(self, given: int) -> bool:
        """Whether an operator that names axis ``given`` means this one."""
        if given < 0:
            return given == self.axis
        return given == len(self.value.shape) + self.axis if self.value.shape else given >= 1


def sizes(tensor: gs.Tensor, features: FeatureAxis, depth: int = _DEPTH) -> list[int] | None:
    """The numbers in ``tensor``, where they are constant or arithmetic on the width of the features; else None."""
    known = integers(tensor)
    if known is not None:
        return known
    node = producer(tensor)
    if node is None or depth == 0 or not node.inputs:
        return None
    if node.op in ("Gather", "Slice"):
        shape = producer(node.inputs[0])
        if shape is not None and shape.op == "Shape":
            index = integers(node.inputs[1])
            return [features.width] if index is not None and len(index) == 1 and features.holds(index[0]) else None
    if node.op in ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"):
        return sizes(node.inputs[0], features, depth - 1)
    if node.op not in _ARITHMETIC:
        return None
    parts = [sizes(value, features, depth - 1) for value in node.inputs]
    return None if any(part is None for part in parts) else _ARITHMETIC[node.op]([part for part in parts if part is not None])


def _elementwise(function: Callable[[int, int], int]) -> Callable[[list[list[int]]], list[int] | None]:
    def apply(parts: list[list[int]]) -> list[int] | None:
        if len(parts) != 2 or not all(len(part) in (1, max(map(len, parts))) for part in parts):
            return None
        length = max(map(len, parts))
        left, right = (part * (length // len(part)) if part else [] for part in parts)
        try:
            return [function(a, b) for a, b in zip(left, right, strict=True)]
        except ZeroDivisionError:
            return None
    return apply


def _tile(parts: list[list[int]]) -> list[int] | None:
    return parts[0] * parts[1][0] if len(parts[1]) == 1 and len(parts[0]) * parts[1][0] <= 1 << 16 else None


_ARITHMETIC: dict[str, Callable[[list[list[int]]], list[int] | None]] = {
    "Add": _elementwise(lambda a, b: a + b), "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b), "Div": _elementwise(lambda a, b: a // b), "Mod": _elementwise(lambda a, b: a % b),
    "Tile": _tile, "Concat": lambda parts: [number for part in parts for number in part],
}
