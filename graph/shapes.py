"""Operators that pass numbers on unchanged, and what they do to the axis that holds the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_graphsurgeon as gs

from .constant import integers
from .edit import producer
from .rejection import Refusal


def turn_axis(node: gs.Node, axis: int) -> int:
    """Where in the input of ``node`` the features are, given their axis (negative) in its output."""
    if node.op == "Transpose" and "perm" in node.attrs and -axis <= len(node.attrs["perm"]):
        perm = node.attrs["perm"]
        return int(perm[axis]) - len(perm)
    if node.op in ("Squeeze", "Unsqueeze"):
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
        longer = node.inputs[0] if node.op == "Squeeze" else node.outputs[0]
        rank = len(longer.shape) if longer.shape else None
        behind = [a - rank if a >= 0 and rank else a for a in axes or []]  # a leading axis where the rank is unknown
        behind = sorted((a for a in behind if a < 0), reverse=True)
        if node.op == "Squeeze":
            for a in behind:
                axis -= a >= axis
            return axis
        return axis + sum(a > axis for a in behind)
    return axis


def last_dimension(node: gs.Node) -> int | None:
    """The last dimension of what a Reshape gives, where it can be told; -1 where it is left to be inferred."""
    known = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("shape")
    if known:
        if known[-1] == 0 or (known[-1] == -1 and all(dim == 0 for dim in known[:-1])):
            return 0  # copied from the input
        if known[-1] > 0:
            return int(known[-1])
    shape = node.outputs[0].shape
    if shape and isinstance(shape[-1], int) and shape[-1] > 0:
        return int(shape[-1])
    joined = producer(node.inputs[1]) if len(node.inputs) > 1 else None
    while joined is not None and joined.op in ("Cast", "Identity"):
        joined = producer(joined.inputs[0])
    if joined is not None and joined.op == "Shape" and not {"start", "end"} & set(joined.attrs):
        return 0  # of some value, which has this one's width where the Reshape is a way back to its dimensions
    if joined is not None and joined.op == "Concat":
        last = integers(joined.inputs[-1])
        if last:
            return last[-1]
        size = _size_of_last_axis(joined.inputs[-1])
        if size is not None:
            return size
    return -1 if known else None


def _size_of_last_axis(tensor: gs.Tensor) -> int | None:
    """0 where ``tensor`` is the size of the last axis of some value, read by Shape and Gather(-1) or Slice(-1:)."""
    node = producer(tensor)
    while node is not None and node.op in ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"):
        node = producer(node.inputs[0])
    if node is None or node.op not in ("Gather", "Slice") or len(node.inputs) < 2:
        return None
    index = integers(node.inputs[1])
    source = producer(node.inputs[0])
    return 0 if index == [-1] and source is not None and source.op == "Shape" else None


def _reshape(node: gs.Node, axis: int, width: int) -> Refusal | None:
    last = last_dimension(node)
    if axis != -1 or last is None or last not in (0, width):
        if axis == -1 and last == -1:
            return None  # [-1] in the last place with the leading dimensions spelled out
        return Refusal(node.outputs[0].name, "a Reshape that does not keep the features on the last axis")
    return None


def _keep(node: gs.Node, axis: int, width: int) -> Refusal | None:
    return None


def _flatten(node: gs.Node, axis: int, width: int) -> Refusal | None:
    return None if axis == -1 else Refusal(node.outputs[0].name, "a Flatten that moves the features")


ALIASES: Mapping[str, Callable[[gs.Node, int, int], Refusal | None]] = {
    "Identity": _keep, "Cast": _keep, "CastLike": _keep, "Dropout": _keep, "Squeeze": _keep, "Unsqueeze": _keep,
    "QuantizeLinear": _keep, "DequantizeLinear": _keep, "Reshape": _reshape, "Flatten": _flatten,
}
"""Operators whose first output holds the numbers of their first input, each with a check that the features stay."""

_REPEATS = frozenset({"Transpose", "Expand", "Tile", "DynamicQuantizeLinear"})


def root(tensor: gs.Tensor) -> gs.Tensor:
    """The value that ``tensor`` is, before casts, reshapes, transposes, quantization and repetition for experts."""
    node = producer(tensor)
    while node is not None and (node.op in ALIASES or node.op in _REPEATS):
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor
