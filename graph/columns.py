"""Which columns of a fused linear a value holds, whatever cut them out: Split, Slice, Gather or SplitToSequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from .constant import integers
from .edit import producer
from .linear import Linear
from .shapes import ALIASES, turn_axis

Selection = npt.NDArray[np.int64] | None
Found = tuple[Linear, npt.NDArray[np.int64], list[gs.Node]]
_DEPTH = 12


def select(tensor: gs.Tensor, axis: int, width: int, linears: Mapping[int, Linear]) -> Found | None:
    """The linear, the ``width`` columns of it that ``tensor`` holds, and the nodes that cut them out.

    None where ``tensor`` is not a proper choice of columns.
    """
    found = _trace(tensor, axis, linears, _DEPTH)
    if found is None:
        return None
    _, columns, nodes = found
    if len(columns) != width or not nodes or all(node.op in ALIASES for node in nodes):
        return None
    return found


def _trace(tensor: gs.Tensor, axis: int, linears: Mapping[int, Linear], depth: int) -> Found | None:
    linear = linears.get(id(tensor))
    if linear is not None and linear.axis == axis:
        return linear, np.arange(linear.d_out), []
    node = producer(tensor)
    if node is None or depth == 0 or node.op not in (*ALIASES, *_CUTTERS) or not node.inputs:
        return None
    sequence = producer(node.inputs[0]) if node.op == "SequenceAt" else None
    if node.op == "SequenceAt" and (sequence is None or sequence.op != "SplitToSequence"):
        return None
    found = _trace((sequence or node).inputs[0], turn_axis(node, axis), linears, depth - 1)
    if found is None:
        return None
    linear, columns, nodes = found
    if sequence is not None:
        nodes = [*nodes, sequence]
    if node.op in ALIASES:
        if ALIASES[node.op](node, axis, len(columns)) is not None:
            return None
        return linear, columns, [*nodes, node]
    index = _CUTTERS[node.op](node, tensor, axis, len(columns))
    return None if index is None else (linear, columns[index], [*nodes, node])


def _is_feature_axis(given: int, axis: int, value: gs.Tensor) -> bool:
    if given < 0:
        return given == axis
    return given == len(value.shape) + axis if value.shape else given >= 1


def _split(node: gs.Node, tensor: gs.Tensor, axis: int, width: int) -> Any:
    if not _is_feature_axis(int(node.attrs.get("axis", 0)), axis, node.inputs[0]):
        return None
    sizes = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("split")
    count = len(node.outputs)
    if not sizes:
        size = -(-width // count)
        sizes = [size] * (count - 1) + [width - size * (count - 1)]
    number = next(i for i, output in enumerate(node.outputs) if output is tensor)
    return slice(sum(sizes[:number]), sum(sizes[:number + 1])) if sum(sizes) == width else None


def _slice(node: gs.Node, tensor: gs.Tensor, axis: int, width: int) -> Any:
    if len(node.inputs) > 1:
        starts = _number(node.inputs[1], node.inputs[0], axis, width)
        ends = _number(node.inputs[2], node.inputs[0], axis, width)
        axes = integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3].name else [0]
        steps = integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    else:
        start, end = list(node.attrs["starts"]), list(node.attrs["ends"])
        if len(start) != 1:
            return None
        starts, ends, axes, steps = start[0], end[0], list(node.attrs.get("axes", [0])), [1]
    if starts is None or ends is None or axes is None or steps is None or len(axes) != 1:
        return None
    if not _is_feature_axis(axes[0], axis, node.inputs[0]):
        return None
    return slice(starts, ends, steps[0])


def _gather(node: gs.Node, tensor: gs.Tensor, axis: int, width: int) -> Any:
    if not _is_feature_axis(int(node.attrs.get("axis", 0)), axis, node.inputs[0]):
        return None
    indices = integers(node.inputs[1])
    return np.asarray(indices) if indices and len(indices) > 1 else None


def _sequence_at(node: gs.Node, tensor: gs.Tensor, axis: int, width: int) -> Any:
    sequence = producer(node.inputs[0])
    position = integers(node.inputs[1])
    if sequence is None or position is None:
        return None
    if not _is_feature_axis(int(sequence.attrs.get("axis", 0)), axis, sequence.inputs[0]):
        return None
    sizes = integers(sequence.inputs[1]) if len(sequence.inputs) > 1 else [1]
    if not sizes:
        return None
    if len(sizes) == 1:
        sizes = [min(sizes[0], width - start) for start in range(0, width, sizes[0])]
    part = position[0] % len(sizes)
    return slice(sum(sizes[:part]), sum(sizes[:part + 1])) if sum(sizes) == width else None


def _number(tensor: gs.Tensor, cut: gs.Tensor, axis: int, width: int) -> int | None:
    """A bound of a Slice: a constant, or arithmetic on the size of the axis that is cut."""
    known = integers(tensor)
    if known is not None:
        return known[0] if len(known) == 1 else None
    node = producer(tensor)
    if node is None:
        return None
    if node.op in ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"):
        return _number(node.inputs[0], cut, axis, width)
    if node.op in ("Gather", "Slice"):
        shape = producer(node.inputs[0])
        index = integers(node.inputs[1])
        if shape is None or shape.op != "Shape" or index is None or len(index) != 1:
            return None
        return width if _is_feature_axis(index[0], axis, cut) else None
    if node.op in _ARITHMETIC:
        left = _number(node.inputs[0], cut, axis, width)
        right = _number(node.inputs[1], cut, axis, width)
        return None if left is None or right is None else _ARITHMETIC[node.op](left, right)
    return None


_ARITHMETIC: dict[str, Callable[[int, int], int | None]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b,
               "Div": lambda a, b: a // b if b else None}
_CUTTERS = {"Split": _split, "Slice": _slice, "Gather": _gather, "SequenceAt": _sequence_at}
