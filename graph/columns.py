"""Which columns of a fused linear a value holds, whatever cut them out: Split, Slice, Gather or SplitToSequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from .constant import Folded, fold, integers
from .edit import producer
from .linear import Linear
from .picked import picked
from .shapes import ALIASES, turn_axis

Selection = npt.NDArray[np.int64] | None
_DEPTH = 12


@dataclass(frozen=True)
class Cut:
    """Columns of a linear that a value holds.

    Attributes:
        linear: where they come from.
        columns: which, in order.
        nodes: the nodes between the linear and the value, the first one first.
        added: constants added on the way, and which numbers of them have come as far as the value.
    """

    linear: Linear
    columns: npt.NDArray[np.int64]
    nodes: list[gs.Node] = field(default_factory=list)
    added: list[tuple[Folded, npt.NDArray[np.int64]]] = field(default_factory=list)

    def behind(self, node: gs.Node, index: Any = None) -> Cut:
        """The cut behind ``node``, which passes on what ``index`` picks, or everything."""
        index = slice(None) if index is None else index
        return Cut(self.linear, self.columns[index], [*self.nodes, node], [(each, kept[index]) for each, kept in self.added])

    def constants(self) -> list[Folded]:
        """What is added, cut as the value is."""
        return [_chosen(folded, kept) for folded, kept in self.added]


def _chosen(folded: Folded, kept: npt.NDArray[np.int64]) -> Folded:
    return replace(folded, shape=(*folded.shape[:-1], len(kept)), load=lambda: np.ascontiguousarray(folded.load()[..., kept]),
                   sources=[])


def select(tensor: gs.Tensor, axis: int, width: int, linears: Mapping[int, Linear]) -> Cut | None:
    """The linear, the ``width`` columns of it that ``tensor`` holds, and the nodes that cut them out.

    None where ``tensor`` is not a proper choice of columns.
    """
    cut = _trace(tensor, axis, linears, _DEPTH)
    if cut is None or len(cut.columns) != width or not any(node.op in _CUTTERS for node in cut.nodes):
        return None
    return cut


def _trace(tensor: gs.Tensor, axis: int, linears: Mapping[int, Linear], depth: int) -> Cut | None:
    linear = linears.get(id(tensor))
    if linear is not None and linear.axis == axis:
        return Cut(linear, np.arange(linear.d_out))
    node = producer(tensor)
    if node is None or depth == 0 or not node.inputs or node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op == "Add":
        return _added(node, axis, linears, depth)
    if node.op == "SequenceAt":
        sequence = producer(node.inputs[0])
        if sequence is None or sequence.op != "SplitToSequence":
            return None
        cut = _trace(sequence.inputs[0], axis, linears, depth - 1)
        index = _sequence_at(node, tensor, axis, len(cut.columns)) if cut is not None else None
        return None if cut is None or index is None else cut.behind(sequence).behind(node, index)
    if node.op not in ALIASES and node.op not in _CUTTERS:
        return None
    cut = _trace(node.inputs[0], turn_axis(node, axis), linears, depth - 1)
    if cut is None:
        return None
    if node.op in ALIASES:
        return cut.behind(node) if ALIASES[node.op](node, axis, len(cut.columns)) is None else None
    index = _CUTTERS[node.op](node, tensor, axis, len(cut.columns))
    return None if index is None else cut.behind(node, index)


def _added(node: gs.Node, axis: int, linears: Mapping[int, Linear], depth: int) -> Cut | None:
    """A bias between the linear and the place where it is cut, where it is not next to the linear."""
    if len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        folded = fold(other) or picked(other)
        if folded is None or axis != -1:
            continue
        cut = _trace(value, axis, linears, depth - 1)
        if cut is None or not (cut.linear.quantized or cut.linear.experts != 1):
            return None  # elsewhere a bias stands next to its linear
        if folded.shape[-1:] != cut.columns.shape or folded.size != len(cut.columns):
            return None
        if folded.experts != 1 and not cut.linear.gathered:
            return None
        behind = cut.behind(node)
        behind.added.append((folded, np.arange(len(cut.columns))))
        return behind
    return None


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
