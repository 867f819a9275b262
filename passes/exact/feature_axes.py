"""Where one number a feature ends up when the features are cut into heads, turned, repeated and put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.constant import fold, integers
from ...graph.edit import producer

Array = npt.NDArray[Any]
OTHER, ONE, FEATURE = "other", "one", "feature"
"""What an axis holds: something else (rows, tokens), nothing (its size is 1), or features."""


@dataclass(frozen=True)
class FeatureAxes:
    """Numbers that depend on features only, in the shape of the value that has them.

    Attributes:
        numbers: size 1 on every axis that holds no features; axes in front of it may be missing.
        axes: what each axis of ``numbers`` holds.
    """

    numbers: Array
    axes: tuple[str, ...]

    @classmethod
    def last(cls, numbers: Array) -> FeatureAxes:
        """Features on the last axis, whatever the rank."""
        return cls(numbers.reshape(-1), (FEATURE,))

    @property
    def vector(self) -> Array | None:
        """The numbers where they are one a feature of the last axis, else None."""
        return self.numbers.reshape(-1) if FEATURE not in self.axes[:-1] else None

    def padded(self, rank: int) -> FeatureAxes:
        """With at least ``rank`` axes."""
        missing = max(0, rank - len(self.axes))
        return FeatureAxes(self.numbers.reshape(*[1] * missing, *self.numbers.shape), (OTHER,) * missing + self.axes)


def through(node: gs.Node, value: FeatureAxes) -> FeatureAxes | None:
    """``value`` behind ``node``, which reads it as its first input; None where that cannot be told for sure."""
    if node.domain not in (None, "", "ai.onnx"):
        return None
    rule = _RULES.get(node.op)
    return rule(node, value) if rule is not None else None


def sizes(node: gs.Node) -> list[int | None]:
    """The dimensions that a Reshape or Expand asks for, None where one is computed; [] where not even their number is known.

    What the graph says of the output's shape fills gaps.
    """
    asked: list[int | None] = list(integers(node.inputs[1]) or []) if len(node.inputs) > 1 else []
    asked = asked or list(node.attrs.get("shape", []))
    joined = producer(node.inputs[1]) if not asked and len(node.inputs) > 1 else None
    if joined is not None and joined.op == "Concat":
        for part in joined.inputs:
            known = integers(part)
            if known is None and _count(part) != 1:
                asked = []
                break
            asked += known if known is not None else [None]
    stated = node.outputs[0].shape
    if not stated or (asked and len(asked) != len(stated)):
        return asked
    asked = asked or [None] * len(stated)
    return [said if isinstance(said, int) and said > 0 and (size is None or size < 1) else size
            for size, said in zip(asked, stated, strict=True)]


def _count(tensor: gs.Tensor) -> int | None:
    """How many numbers a list of dimensions has."""
    node = producer(tensor)
    if tensor.shape is not None and len(tensor.shape) == 1 and isinstance(tensor.shape[0], int):
        return tensor.shape[0]
    if node is not None and node.op == "Unsqueeze":
        inner = producer(node.inputs[0])
        index = fold(inner.inputs[1]) if inner is not None and inner.op == "Gather" else None
        return 1 if index is not None and index.shape == () else None
    if node is not None and node.op == "Gather":
        index = fold(node.inputs[1])
        return 1 if index is not None and index.shape == (1,) else None
    if node is not None and node.op == "Slice" and len(node.inputs) > 2:
        start, end = integers(node.inputs[1]), integers(node.inputs[2])
        if start and end and len(start) == 1 and end[0] - start[0] == 1 and (start[0] >= 0 or end[0] < 0):
            return 1
    return None


def _reshape(node: gs.Node, value: FeatureAxes) -> FeatureAxes | None:
    asked = sizes(node)
    if not asked:
        return None
    if all(axis == FEATURE for axis in value.axes[value.axes.index(FEATURE):]):
        cut = _ending(asked, value.numbers.size)
        if cut is not None:
            numbers = value.numbers.reshape(*[1] * (len(asked) - len(cut)), *cut)
            return FeatureAxes(numbers, (OTHER,) * (len(asked) - len(cut)) + (FEATURE,) * len(cut))
    return _same_rows(node, value)


def _ending(asked: list[int | None], size: int) -> list[int] | None:
    """The last dimensions whose product is ``size``."""
    taken: list[int] = []
    for dim in reversed(asked):
        if dim is None or dim < 1:
            return None
        taken.insert(0, dim)
        if math.prod(taken) >= size:
            return taken if math.prod(taken) == size else None
    return None


def _same_rows(node: gs.Node, value: FeatureAxes) -> FeatureAxes | None:
    """A Reshape that joins or cuts features between axes that stay, where the graph says the shapes before and after."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if not before or not after or len(before) < len(value.axes):
        return None
    value = value.padded(len(before))
    shape: list[int] = []
    axes: list[str] = []
    rest = list(after)
    place = 0
    while place < len(value.axes):
        run = place
        while run < len(value.axes) and value.axes[run] == FEATURE:
            run += 1
        if run == place:
            if not rest or before[place] is None or rest[0] != before[place]:
                return None
            rest.pop(0)
            shape, axes, place = [*shape, 1], [*axes, value.axes[place]], place + 1
            continue
        size, taken = math.prod(value.numbers.shape[place:run]), 1
        while taken < size and rest and isinstance(rest[0], int) and rest[0] > 0:
            taken *= rest[0]
            shape, axes = [*shape, rest.pop(0)], [*axes, FEATURE]
        if taken != size:
            return None
        place = run
    return None if rest else FeatureAxes(value.numbers.reshape(shape), tuple(axes))


def _transpose(node: gs.Node, value: FeatureAxes) -> FeatureAxes | None:
    perm = node.attrs.get("perm")
    if not perm or len(perm) < len(value.axes):
        return None
    value = value.padded(len(perm))
    return FeatureAxes(value.numbers.transpose(perm), tuple(value.axes[axis] for axis in perm))


def _axes(node: gs.Node) -> list[int] | None:
    return integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")


def _unsqueeze(node: gs.Node, value: FeatureAxes) -> FeatureAxes | None:
    axes, shape = _axes(node), node.inputs[0].shape
    if not axes or len(axes) != 1 or (axes[0] >= 0 and not shape and len(value.axes) == 1):
        return None
    value = value.padded(len(shape) if shape else len(value.axes))
    place = axes[0] if axes[0] >= 0 else len(value.axes) + 1 + axes[0]
    if not 0 <= place <= len(value.axes):
        return None
    return FeatureAxes(np.expand_dims(value.numbers, place), (*value.axes[:place], ONE, *value.axes[place:]))


def _expand(node: gs.Node, value: FeatureAxes) -> FeatureAxes | None:
    asked = sizes(node)
    if len(asked) < len(value.axes):
        return None
    value = value.padded(len(asked))
    repeats, axes = [1] * len(asked), list(value.axes)
    for place, (axis, dim) in enumerate(zip(value.axes, asked, strict=True)):
        if axis == ONE and dim is not None and dim > 1:
            repeats[place], axes[place] = dim, FEATURE
        elif axis == ONE and dim != 1:
            axes[place] = OTHER
        elif axis == FEATURE and dim not in (1, value.numbers.shape[place]):
            return None
    return FeatureAxes(np.tile(value.numbers, repeats), tuple(axes))


_RULES: Mapping[str, Callable[[gs.Node, FeatureAxes], FeatureAxes | None]] = {
    "Reshape": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Expand": _expand,
    "Identity": lambda node, value: value}
