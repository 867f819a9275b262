"""Columns that a Reshape has laid out in two axes, one index of which is taken.

    [*, a·b] ──Reshape──► [*, a, b] ──[Transpose]──► Gather of one index, or Split and Squeeze, along a or b
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from .constant import integers
from .edit import producer


@dataclass(frozen=True)
class Half:
    """What is taken from a value whose last axis was laid out in two.

    Attributes:
        value: the value ``[*, a·b]`` that was reshaped.
        width: a·b.
        columns: which of its columns are taken.
        nodes: from the Reshape to the taking.
    """

    value: gs.Tensor
    width: int
    columns: npt.NDArray[np.int64]
    nodes: list[gs.Node]


@dataclass(frozen=True)
class _Taken:
    source: gs.Tensor
    axis: int
    index: int
    nodes: list[gs.Node]


def half(tensor: gs.Tensor, axis: int, width: int) -> Half | None:
    """How ``tensor`` takes ``width`` columns, which lie on its axis ``axis`` (negative), from a value laid out in two axes.

    None where it is not computed so.
    """
    taken = _taken(tensor)
    if taken is None:
        return None
    source, between = taken.source, []
    node = producer(source)
    while node is not None and node.op in ("Transpose", "Identity", "Cast"):
        between.append(node)
        source = node.inputs[0]
        node = producer(source)
    if node is None or node.op != "Reshape" or len(node.inputs) < 2:
        return None
    sizes, rank = _laid_out(node)
    labels = [-2, -1] if rank is None else list(range(-rank, 0))
    for turn in reversed(between):
        if turn.op == "Transpose":
            perm = turn.attrs.get("perm")
            if rank is None or perm is None or len(perm) != rank:
                return None
            labels = [labels[place] for place in perm]
    if taken.axis >= 0 and rank is None:
        return None
    place = taken.axis if taken.axis >= 0 else len(labels) + taken.axis
    if not 0 <= place < len(labels) or labels[place] not in (-1, -2):
        return None
    along = labels.pop(place)
    if labels.index(-3 - along) - len(labels) != axis:
        return None
    kept, other = (sizes[0], sizes[1]) if along == -1 else (sizes[1], sizes[0])
    if kept not in (-1, width) or other < 1 or not -other <= taken.index < other:
        return None
    grid: npt.NDArray[np.int64] = np.arange(width * other).reshape((width, other) if along == -1 else (other, width))
    columns = grid[:, taken.index] if along == -1 else grid[taken.index]
    return Half(node.inputs[0], grid.size, columns, [node, *reversed(between), *taken.nodes])


def _taken(tensor: gs.Tensor) -> _Taken | None:
    """The axis and index that ``tensor`` takes, which its source has and ``tensor`` has not."""
    node = producer(tensor)
    if node is None:
        return None
    if node.op == "Gather" and node.inputs:
        index = integers(node.inputs[1])
        if index is None or len(index) != 1 or _is_list(node.inputs[1]):
            return None
        return _Taken(node.inputs[0], int(node.attrs.get("axis", 0)), index[0], [node])
    if node.op != "Squeeze":
        return None
    inner = producer(node.inputs[0])
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    if inner is None or not axes or len(axes) != 1:
        return None
    found = _one_of(inner, node.inputs[0])
    if found is None:
        return None
    axis, index_taken = found
    rank = len(inner.inputs[0].shape) if inner.inputs[0].shape else None
    same = axis == axes[0] or (rank is not None and axis % rank == axes[0] % rank)
    return _Taken(inner.inputs[0], axis, index_taken, [inner, node]) if same else None


def _one_of(node: gs.Node, tensor: gs.Tensor) -> tuple[int, int] | None:
    """Axis and index where ``tensor`` is a part of size 1 that ``node`` cuts out."""
    if node.op == "Split":
        parts = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("split")
        if parts and set(parts) != {1}:
            return None
        return int(node.attrs.get("axis", 0)), next(i for i, output in enumerate(node.outputs) if output is tensor)
    if node.op == "Gather":
        index = integers(node.inputs[1])
        return (int(node.attrs.get("axis", 0)), index[0]) if index is not None and len(index) == 1 else None
    if node.op == "Slice" and len(node.inputs) > 3:
        starts, ends, axes = (integers(value) for value in node.inputs[1:4])
        if starts and ends and axes and len(axes) == 1 and (ends[0] == starts[0] + 1 or (starts[0] == -1 and ends[0] > 0)):
            return axes[0], starts[0]
    return None


def _is_list(tensor: gs.Tensor) -> bool:
    """Whether a constant index keeps its axis (``[1]``), unlike a plain number."""
    values = tensor._values if isinstance(tensor, gs.Constant) else None
    if values is None:
        node = producer(tensor)
        value = node.attrs.get("value") if node is not None and node.op == "Constant" else None
        values = value._values if isinstance(value, gs.Constant) else None
    return values is None or len(values.shape) != 0


def _laid_out(node: gs.Node) -> tuple[tuple[int, int], int | None]:
    """The last two dimensions that a Reshape gives (-1 where inferred, 0 where unknown), and its rank where known."""
    known = integers(node.inputs[1])
    shape = node.outputs[0].shape
    rank = len(shape) if shape else None
    if known is not None:
        return ((known[-2], known[-1]), len(known)) if len(known) > 1 else ((0, 0), len(known))
    tail: list[int] = []
    joined = producer(node.inputs[1])
    if joined is not None and joined.op == "Concat":
        for value in reversed(joined.inputs):
            part = integers(value)
            tail = [*(part if part is not None else [0]), *tail]
            if part is None and rank is None and not _is_one(value):
                break
        else:
            rank = len(tail) if rank is None else rank
    tail = [0, 0, *tail]
    return (tail[-2], tail[-1]), rank


def _is_one(tensor: gs.Tensor) -> bool:
    """Whether a list of dimensions has one entry, told by how it was made."""
    node = producer(tensor)
    return node is not None and node.op == "Unsqueeze"
