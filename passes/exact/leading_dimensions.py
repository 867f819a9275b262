"""Whether two values have the same dimensions in front of their last, told from shapes in the file or from what computes them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.broadcast import keeps_rank
from ...graph.constant import fold, integers
from ...graph.edit import producer
from ...graph.pointwise import POINTWISE

_DEEPEST = 40
_KEEPS = frozenset({"Cast", "Identity", "Dropout", "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
                    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
Entry = tuple[gs.Tensor, int]
"""Dimension ``i`` of a value; −1 for all but its last."""


def reshapes_to(node: gs.Node, x: gs.Tensor) -> bool:
    """Whether the Reshape ``node`` gives its input the leading dimensions of ``x``."""
    given, wanted = node.outputs[0].shape, x.shape
    if given and wanted and len(given) == len(wanted) and all(dim is not None for dim in given[:-1]) and (
            list(given[:-1]) == list(wanted[:-1])):
        return True
    entries = _entries(node.inputs[1], 12) if len(node.inputs) > 1 else None
    if not entries or len(entries) < 2:
        return False
    start, leading = _origin(x, _DEEPEST), entries[:-1]
    if len(leading) == 1 and isinstance(leading[0], tuple) and leading[0][1] == -1:
        return _origin(leading[0][0], _DEEPEST) is start
    if wanted and len(wanted) != len(entries):
        return False
    inferred = 0
    for place, entry in enumerate(leading):
        if isinstance(entry, tuple):
            if entry[1] != place or _origin(entry[0], _DEEPEST) is not start:
                return False
        elif entry == -1:
            inferred += 1
        elif not wanted or wanted[place] != entry:
            return False
    return inferred <= 1 and isinstance(entries[-1], int) and entries[-1] > 0


def _origin(tensor: gs.Tensor, depth: int) -> gs.Tensor:
    """The earliest value that is sure to have the leading dimensions of ``tensor``."""
    node = producer(tensor)
    if node is None or depth == 0 or not node.inputs:
        return tensor
    if node.op in _KEEPS:
        return _origin(node.inputs[0], depth - 1)
    if node.op == "ReduceMean" and node.attrs.get("keepdims", 1) and _over_last(node):
        return _origin(node.inputs[0], depth - 1)
    if node.op == "MatMul" and not node.domain:
        weight = fold(node.inputs[1])
        return _origin(node.inputs[0], depth - 1) if weight is not None and len(weight.shape) == 2 else tensor
    if node.op == "Reshape":
        return _of_reshape(node, depth)
    if (node.domain or "", node.op) in POINTWISE and len(node.outputs) == 1:
        others = [value for value in node.inputs if value.name and not _is_narrow(value)]
        origins = {id(origin): origin for origin in (_origin(value, depth - 1) for value in others)}
        constants = [folded for folded in (fold(value) for value in node.inputs if value.name) if folded is not None]
        if len(origins) == 1 and all(keeps_rank(value, folded.shape) for value in others for folded in constants):
            return next(iter(origins.values()))
    return tensor


def _of_reshape(node: gs.Node, depth: int) -> gs.Tensor:
    """The value whose leading dimensions a Reshape spells out one by one, if it does."""
    entries = _entries(node.inputs[1], 12) if len(node.inputs) > 1 else None
    if not entries or len(entries) < 2:
        return node.outputs[0]
    leading = entries[:-1]
    sources = {id(entry[0]): entry[0] for entry in leading if isinstance(entry, tuple)}
    spelled = all(isinstance(entry, tuple) and entry[1] == place for place, entry in enumerate(leading))
    prefix = len(leading) == 1 and isinstance(leading[0], tuple) and leading[0][1] == -1
    if len(sources) == 1 and (spelled or prefix):
        return _origin(next(iter(sources.values())), depth - 1)
    return node.outputs[0]


def _is_narrow(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is a constant that changes no dimension it is broadcast against but perhaps the last."""
    folded = fold(tensor)
    return folded is not None and all(dim == 1 for dim in folded.shape[:-1])


def _over_last(node: gs.Node) -> bool:
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    return axes is not None and list(axes) == [-1]


def _entries(tensor: gs.Tensor, depth: int) -> list[int | Entry] | None:
    """What a list of dimensions is made of: numbers, and dimensions of values; None where that cannot be told."""
    known = integers(tensor)
    if known is not None:
        return list(known)
    node = producer(tensor)
    if node is None or depth == 0:
        return None
    if node.op == "Concat":
        parts = [_entries(value, depth - 1) for value in node.inputs]
        return None if any(part is None for part in parts) else [entry for part in parts for entry in part or []]
    if node.op in ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"):
        return _entries(node.inputs[0], depth - 1)
    if node.op == "Shape":
        start, end = node.attrs.get("start", 0), node.attrs.get("end")
        if end is None:
            return None
        return [(node.inputs[0], i) for i in range(start, end)] if 0 <= start < end else (
            [(node.inputs[0], -1)] if (start, end) == (0, -1) else None)
    shape = producer(node.inputs[0]) if node.op in ("Gather", "Slice") else None
    if shape is None or shape.op != "Shape" or shape.attrs.get("start", 0) or "end" in shape.attrs:
        return None
    if node.op == "Gather":
        indices = integers(node.inputs[1])
        return None if not indices or min(indices) < 0 else [(shape.inputs[0], i) for i in indices]
    bounds = [integers(value) for value in node.inputs[1:3]]
    if bounds[0] is None or bounds[1] is None or len(bounds[0]) != 1 or (len(node.inputs) > 4):
        return None
    first, last = bounds[0][0], bounds[1][0]
    if first == 0 and last == -1:
        return [(shape.inputs[0], -1)]
    return [(shape.inputs[0], i) for i in range(first, last)] if 0 <= first < last < 16 else None
