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
from .halves import half
from .linear import Linear
from .picked import picked
from .shapes import ALIASES, turn_axis
from .sizes import FeatureAxis, sizes

Selection = npt.NDArray[np.int64] | None
_DEPTH = 12
_EVERYTHING = (1 << 31) - 1  # exporters write the end of an axis as the largest number of 32 or 64 bits


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
    cut = _trace(tensor, axis, linears, _DEPTH) or _half(tensor, axis, width, linears)
    if cut is None or len(cut.columns) != width or not any(node.op in _CUTTERS for node in cut.nodes):
        return None
    return cut


def _half(tensor: gs.Tensor, axis: int, width: int, linears: Mapping[int, Linear]) -> Cut | None:
    part = half(tensor, axis, width)
    cut = _trace(part.value, -1, linears, _DEPTH) if part is not None else None
    if part is None or cut is None or len(cut.columns) != part.width:
        return None
    for node in part.nodes[:-1]:
        cut = cut.behind(node)
    return cut.behind(part.nodes[-1], part.columns)


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
        index = (None if cut is None else
                 _sequence_at(node, tensor, FeatureAxis(sequence.inputs[0], axis, len(cut.columns))))
        return None if cut is None or index is None else cut.behind(sequence).behind(node, index)
    if node.op not in ALIASES and node.op not in _CUTTERS:
        return None
    cut = _trace(node.inputs[0], turn_axis(node, axis), linears, depth - 1)
    if cut is None:
        return None
    if node.op in ALIASES:
        return cut.behind(node) if ALIASES[node.op](node, axis, len(cut.columns)) is None else None
    index = _CUTTERS[node.op](node, tensor, FeatureAxis(node.inputs[0], axis, len(cut.columns)))
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


def _split(node: gs.Node, tensor: gs.Tensor, features: FeatureAxis) -> Any:
    if not features.holds(int(node.attrs.get("axis", 0))):
        return None
    parts = sizes(node.inputs[1], features) if len(node.inputs) > 1 and node.inputs[1].name else node.attrs.get("split")
    count, width = len(node.outputs), features.width
    if not parts:
        size = -(-width // count)
        parts = [size] * (count - 1) + [width - size * (count - 1)]
    number = next(i for i, output in enumerate(node.outputs) if output is tensor)
    return slice(sum(parts[:number]), sum(parts[:number + 1])) if sum(parts) == width else None


def _slice(node: gs.Node, tensor: gs.Tensor, features: FeatureAxis) -> Any:
    bounds: list[list[int] | None] = [None, None, None, None]
    if len(node.inputs) > 1:
        for number, value in enumerate(node.inputs[1:5]):
            bounds[number] = sizes(value, features) if value.name else None
            if value.name and bounds[number] is None:
                return None
    else:
        bounds = [list(node.attrs["starts"]), list(node.attrs["ends"]), node.attrs.get("axes"), None]
    starts, ends, axes, steps = bounds
    if not starts or not ends:
        return None
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    found = None
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if features.holds(axis):
            found = slice(start, end, step)
        elif start != 0 or end < _EVERYTHING or step != 1:
            return None
    return found


def _gather(node: gs.Node, tensor: gs.Tensor, features: FeatureAxis) -> Any:
    if not features.holds(int(node.attrs.get("axis", 0))):
        return None
    indices = integers(node.inputs[1])
    if not indices or len(indices) < 2 or not all(-features.width <= index < features.width for index in indices):
        return None
    return np.asarray(indices)


def _sequence_at(node: gs.Node, tensor: gs.Tensor, features: FeatureAxis) -> Any:
    sequence = producer(node.inputs[0])
    position = integers(node.inputs[1])
    if sequence is None or not position or not features.holds(int(sequence.attrs.get("axis", 0))):
        return None
    parts = sizes(sequence.inputs[1], features) if len(sequence.inputs) > 1 else [1]
    if not parts or min(parts) < 1:
        return None
    width = features.width
    if len(parts) == 1:
        parts = [min(parts[0], width - start) for start in range(0, width, parts[0])]
    part = position[0] % len(parts)
    return slice(sum(parts[:part]), sum(parts[:part + 1])) if sum(parts) == width else None


_CUTTERS: dict[str, Callable[[gs.Node, gs.Tensor, FeatureAxis], Any]] = {
    "Split": _split, "Slice": _slice, "Gather": _gather, "SequenceAt": _sequence_at}
