"""What is known of a value before anything runs: its dimensions and its type, declared or by what makes it."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from .constant import fold
from .edit import producer

Dimensions = list[int | None]
_DEPTH = 16
_SAME = frozenset({"Identity", "Cast"})


def dimensions(tensor: gs.Tensor, depth: int = _DEPTH) -> Dimensions | None:
    """The dimensions of ``tensor``, None for each that is not known; None where not even their number is.

    What the graph does not declare is followed through Identity, Cast, Transpose and Reshape. One dimension of a Reshape that is
    computed while the model runs is told by the number of elements, which a Reshape keeps.
    """
    folded = fold(tensor)
    if folded is not None and not folded.overridable:
        return list(folded.shape)
    declared: Dimensions | None = None
    if tensor.shape is not None:
        declared = [dim if isinstance(dim, int) and dim >= 0 else None for dim in tensor.shape]
    if depth == 0 or (declared is not None and None not in declared):
        return declared
    traced = _traced(tensor, depth)
    if declared is None or traced is None or len(declared) != len(traced):
        return traced if declared is None else declared
    return [there if dim is None else dim for dim, there in zip(declared, traced, strict=True)]


def element_type(tensor: gs.Tensor, depth: int = _DEPTH) -> int | None:
    """The element type (``TensorProto.DataType``) of ``tensor``, or None where it is not known."""
    folded = fold(tensor)
    if folded is not None:
        return folded.onnx_type
    if tensor.dtype is not None:
        return int(tensor.dtype)
    node = _plain(tensor)
    if node is None or depth == 0:
        return None
    if node.op == "Cast":
        return int(node.attrs["to"])
    return element_type(node.inputs[0], depth - 1) if node.op in ("Identity", "Transpose", "Reshape") else None


def _plain(tensor: gs.Tensor) -> gs.Node | None:
    """The node of ONNX's own operator set that makes ``tensor``."""
    node = producer(tensor)
    return node if node is not None and node.domain in (None, "", "ai.onnx") and node.inputs else None


def _traced(tensor: gs.Tensor, depth: int) -> Dimensions | None:
    node = _plain(tensor)
    if node is None or (node.op not in _SAME and node.op not in ("Transpose", "Reshape")):
        return None
    before = dimensions(node.inputs[0], depth - 1)
    if node.op == "Reshape":
        return _reshaped(node, before, depth)
    if before is None or node.op in _SAME:
        return before
    perm = node.attrs.get("perm") or list(range(len(before)))[::-1]
    return [before[axis] for axis in perm] if sorted(perm) == list(range(len(before))) else None


def _reshaped(node: gs.Node, before: Dimensions | None, depth: int) -> Dimensions | None:
    target = _entries(node.inputs[1], depth - 1) if len(node.inputs) > 1 else None
    if target is None:
        return None
    copies = not node.attrs.get("allowzero", 0)
    after: Dimensions = [
        (before[axis] if before is not None and axis < len(before) else None) if dim == 0 and copies else
        None if dim is None or dim < 0 else dim for axis, dim in enumerate(target)]
    if before is not None and None not in before and after.count(None) == 1:
        size = math.prod(dim for dim in before if dim is not None)
        rest = math.prod(dim for dim in after if dim is not None)
        after[after.index(None)] = size // rest if rest else None
    return after


def _entries(tensor: gs.Tensor, depth: int) -> Dimensions | None:
    """The numbers in the list ``tensor``, None for each that is computed while the model runs."""
    folded = fold(tensor)
    if folded is not None and not folded.overridable:
        return [int(number) for number in folded.load().reshape(-1)] if len(folded.shape) == 1 else None
    node = _plain(tensor)
    if node is None or depth == 0:
        return None
    if node.op == "Unsqueeze":
        return [None]  # of a list of dimensions, so it makes one of a single number
    if node.op in _SAME:
        return _entries(node.inputs[0], depth - 1)
    if node.op != "Concat":
        return None
    parts = [_entries(part, depth - 1) for part in node.inputs]
    return None if any(part is None for part in parts) else [number for part in parts if part is not None for number in part]
