"""What each neuron of a block can give at all: intervals, carried from the linears through the activation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ...graph.constant import fold
from ...graph.pointwise import FUSED, POINTWISE, Array
from ...graph.region import Leaf, Region
from ...graph.shapes import ALIASES

_STEPS = frozenset({"Floor", "Ceil", "Round", "Sign", "Greater", "Less", "Equal", "GreaterOrEqual", "LessOrEqual", "Not",
                    "And", "Or", "Where", "IsNaN", "ThresholdedRelu", "Shrink"})
"""Operators that jump, so that rounding before them may give another number."""
_WIDE = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class Range:
    """Lower and upper limit of a value, ``[d_ff]`` each in float64; equal where it is the same whatever goes in."""

    low: Array
    high: Array

    @classmethod
    def anything(cls, width: int) -> Range:
        """Nothing is known."""
        return cls(np.full(width, -np.inf), np.full(width, np.inf))

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Which neurons give one number whatever goes in."""
        return np.asarray(np.isfinite(self.low) & (self.low == self.high))

    @property
    def zero(self) -> npt.NDArray[np.bool_]:
        """Which neurons give 0 whatever goes in."""
        return np.asarray((self.low == 0) & (self.high == 0))

    def where(self, holds: npt.NDArray[np.bool_]) -> Range:
        """This range for the neurons where ``holds``, anything for the others."""
        return Range(np.where(holds, self.low, -np.inf), np.where(holds, self.high, np.inf))


def follow(region: Region, leaves: list[Range]) -> dict[int, Range]:
    """The range of every value of ``region``, by identity, from those of its leaves (biases included).

    Finite inputs are taken for granted: 0 · h counts as 0.
    """
    found = {id(leaf.tensor): _fused(leaf, start) for leaf, start in zip(region.leaves, leaves, strict=True)}
    for node in region.steps:
        found[id(node.outputs[0])] = _step(node, found, region.width)
    return found


def _fused(leaf: Leaf, start: Range) -> Range:
    if leaf.linear.fused_activation is None:
        return start
    name, attrs = leaf.linear.fused_activation
    with np.errstate(all="ignore"):
        end = Range(FUSED[name](start.low, attrs), FUSED[name](start.high, attrs))
    return end if name in ("Relu", "Clip") else end.where(start.known)


def _step(node: gs.Node, found: dict[int, Range], width: int) -> Range:
    if node.op in ALIASES or node.op == "Transpose":
        start = found.get(id(node.inputs[0]))
        if start is None:
            return Range.anything(width)
        keeps = node.op not in ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear") or _is_wide_cast(node)
        return start if keeps else start.where(start.zero)
    ranges = [_operand(tensor, found, width) for tensor in node.inputs]
    if any(each is None for each in ranges):
        return Range.anything(width)
    operands = [each for each in ranges if each is not None]
    if node.op == "Mul" and not node.domain:
        zero = np.logical_or.reduce([each.zero for each in operands])
        both = np.logical_and.reduce([each.known for each in operands])
        with np.errstate(all="ignore"):
            product = np.where(zero, 0.0, operands[0].low * operands[-1].low)
        return Range(product, product).where(zero | both)
    rising = not node.domain and (node.op in ("Relu", "Max", "Min") or (
        node.op == "Clip" and all(each.known.all() for each in operands[1:])))
    known = np.logical_and.reduce([each.known for each in operands])
    if not rising and (node.op in _STEPS or not known.any()):
        return Range.anything(width)
    function = POINTWISE[(node.domain or "", node.op)]
    empty = [not tensor.name for tensor in node.inputs]
    with np.errstate(all="ignore"):
        low, high = (np.broadcast_to(np.asarray(function(
            [np.empty(0) if none else getattr(each, end) for each, none in zip(operands, empty, strict=True)], node.attrs),
            np.float64), (width,)) for end in ("low", "high"))
    return Range(low, high) if rising else Range(low, low).where(known & np.isfinite(low))


def _operand(tensor: gs.Tensor, found: dict[int, Range], width: int) -> Range | None:
    if id(tensor) in found:
        return found[id(tensor)]
    if not tensor.name:
        return Range(np.zeros(width), np.zeros(width))
    folded = fold(tensor)
    if folded is None or folded.overridable or np.prod(folded.shape, dtype=np.int64) != 1:
        return None
    number = np.broadcast_to(folded.load().reshape(()).astype(np.float64), (width,))
    return Range(number, number)


def _is_wide_cast(node: gs.Node) -> bool:
    return node.op == "Cast" and node.attrs.get("to") in _WIDE
