"""What a rule writes the derivative of one node with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from ..builder import Builder
from ..model import Model
from ..weights import InlineValues

Gradients = list[gs.Tensor | None]
Rule = Callable[["Tape", gs.Node, Gradients, list[bool]], Gradients]
"""(tape, node, gradient of each output or None, which inputs want one) → gradient of each input, None where none is wanted.

Every rule may assume that the gradient of the first output is there, unless it is in ``MANY``."""


class NoDerivativeError(Exception):
    """A rule cannot state the derivative of this node, with these attributes, towards these inputs."""


class Tape:
    """Adds nodes that compute derivatives, in float32; shapes are read when the graph runs.

    Args:
        model: whose main graph the nodes go into.
    """

    def __init__(self, model: Model) -> None:
        self.opset = model.opset
        self._build = Builder(model, model.graph, "gradient")
        self._shapes: dict[int, tuple[gs.Tensor, gs.Tensor]] = {}  # the value itself, so that no other takes its identity

    def op(self, op: str, *inputs: gs.Tensor, **attrs: Any) -> gs.Variable:
        """A node of the default operator set."""
        return self._build.op(op, *inputs, **attrs)

    def split(self, x: gs.Tensor, sizes: gs.Tensor, axis: int, count: int) -> list[gs.Variable]:
        """``x`` cut along ``axis`` into ``count`` parts of ``sizes``."""
        parts = [self._build.value("part") for _ in range(count)]
        self._build.nodes("Split", [x, sizes], list(parts), axis=axis)
        return parts

    def number(self, value: float) -> gs.Constant:
        """A float32 scalar."""
        return self._build.number(value, "number")

    def integers(self, *values: int) -> gs.Constant:
        """An int64 list."""
        return self._build.integers(list(values), "integers")

    def integer(self, value: int) -> gs.Constant:
        """An int64 scalar."""
        return self._build.constant(np.asarray(value, np.int64), "integer")

    def shape(self, x: gs.Tensor) -> gs.Tensor:
        """The dimensions of ``x``: int64 ``[rank]``."""
        held = self._shapes.get(id(x))
        if held is None:
            held = self._shapes[id(x)] = x, self.op("Shape", x)
        return held[1]

    def like(self, g: gs.Tensor, x: gs.Tensor) -> gs.Variable:
        """The numbers of ``g`` in the shape of ``x``."""
        return self.op("Reshape", g, self.shape(x))

    def zeros(self, x: gs.Tensor) -> gs.Variable:
        """Zeros in the shape of ``x``."""
        return self.op("ConstantOfShape", self.shape(x))

    def swap(self, x: gs.Tensor) -> gs.Variable:
        """``x`` with its last two axes exchanged, whatever its rank."""
        return self.op("Einsum", x, equation="...ij->...ji")

    def sum_to(self, g: gs.Tensor, x: gs.Tensor) -> gs.Variable:
        """``g`` added up over the axes along which ``x`` was broadcast to its shape, in the shape of ``x``."""
        wide, own = self.shape(g), self.shape(x)
        missing = self.op("Sub", self.op("Shape", wide), self.op("Shape", own))
        padded = self.op("Concat", self._ones(missing), own, axis=0)
        differing = self.op("NonZero", self.op("Not", self.op("Equal", padded, wide)))
        axes = self.op("Reshape", differing, self.integers(-1))
        return self.like(self.op("ReduceSum", g, axes, keepdims=1, noop_with_empty_axes=1), x)

    def mean(self, x: gs.Tensor) -> gs.Variable:
        """The mean of ``x`` along the last axis, which stays as 1."""
        if self.opset >= 18:
            return self.op("ReduceMean", x, self.integers(-1), keepdims=1)
        return self.op("ReduceMean", x, axes=[-1], keepdims=1)

    def scatter(self, g: gs.Tensor, places: gs.Tensor, x: gs.Tensor, axis: int, *, repeated: bool) -> gs.Variable:
        """Zeros in the shape of ``x`` with the slices of ``g`` added at ``places`` (int64 ``[n]``) along ``axis``.

        Args:
            repeated: a place may be there more than once.
        """
        ones = self._ones(self.op("Shape", self.shape(g)))
        spread = self.op("ScatterElements", ones, self.integers(axis), self.integers(-1), axis=0)
        wide = self.op("Expand", self.op("Reshape", places, spread), self.shape(g))
        if not repeated:
            return self.op("ScatterElements", self.zeros(x), wide, g, axis=axis)
        if self.opset < 16:
            raise NoDerivativeError
        return self.op("ScatterElements", self.zeros(x), wide, g, axis=axis, reduction="add")

    def _ones(self, length: gs.Tensor) -> gs.Variable:
        """Ones: int64 ``[length]``."""
        return self.op("ConstantOfShape", length, value=gs.Constant("", InlineValues(np.ones(1, np.int64))))
