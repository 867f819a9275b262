"""How the output of a block reaches the residual stream: the walk forwards from the down projection.

    y ──► [bias] ──► [reshape, cast, dropout] ──► [norm, scale] ──► [expert weights, scatter, sums] ──► Add ◄── residual

The walk ends at an Add (or SkipLayerNormalization) whose other operand, possibly a sum itself, holds a value that the
block's input was computed from.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_graphsurgeon as gs

from .constant import fold
from .edit import consumers, producer
from .region import NORMS
from .shapes import ALIASES
from .sort import reads

_STEPS = 400
SKIP_NORMS = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})
_NORM_PARTS = frozenset({"Sub", "Div", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "ReduceSumSquare"})
_CARRIERS = frozenset({
    "ScatterND", "ScatterElements", "GatherND", "Gather", "GatherElements", "Slice", "Split", "Concat", "Where", "Transpose",
    "Expand", "ReduceSum", "ReduceMean", "Einsum", "Sum", "Pad", "Tile", "Squeeze", "Unsqueeze", "Trilu", "IndexPut",
    "ScatterAdd", "TensorScatter", "Clip"})


@dataclass(eq=False)
class Join:
    """Where a block joins the residual stream.

    Attributes:
        node: the Add or SkipLayerNormalization.
        branch: the operand that comes from the block.
        residual: the other operand.
        direct: nothing but reshapes and casts lies between the block's output and ``branch``.
        others: operands that were added on the way and are no residual (attention, in parallel blocks; other experts).
    """

    node: gs.Node
    branch: gs.Tensor
    residual: gs.Tensor
    direct: bool
    others: list[gs.Tensor]


class Sublayer(Protocol):
    """What joins a residual stream: an FFN block, or attention."""

    @property
    def path(self) -> str:
        """The graph it is in, by its path."""

    @property
    def graph(self) -> gs.Graph:
        """That graph."""

    @property
    def output(self) -> gs.Tensor:
        """What it gives."""

    @property
    def join(self) -> Join:
        """Where it joins."""

    @property
    def axis(self) -> int:
        """Where its features are, counted from the end."""

    @property
    def onnx_type(self) -> int:
        """Element type of what it gives."""


class Ancestors:
    """What a value was read from: computed without any linear in between, so that it is on the same stream.

    Args:
        positions: the place of each node in a topological order, by identity: an ancestor comes earlier, so the search
            never looks behind the values it is asked about.
        walls: the nodes of linears, by identity: the search does not look behind them.
    """

    def __init__(self, positions: Mapping[int, int], walls: Container[int]) -> None:
        self._positions = positions
        self._walls = walls

    def _place(self, tensor: gs.Tensor) -> int:
        node = producer(tensor)
        return -1 if node is None else self._positions.get(id(node), -1)

    def any(self, candidates: Iterable[gs.Tensor], of: gs.Tensor, limit: int = 4000) -> gs.Tensor | None:
        """The first of ``candidates`` that ``of`` was read from (or is)."""
        wanted: dict[int, gs.Tensor] = {}
        for tensor in candidates:
            wanted[id(tensor)] = tensor
            node = producer(tensor)
            if node is not None and node.op in SKIP_NORMS:  # it gives the sum and the norm of that sum
                wanted.update({id(sibling): tensor for sibling in node.outputs})
        if not wanted:
            return None
        earliest = min(self._place(tensor) for tensor in wanted.values())
        pending, seen = [of], {id(of)}
        while pending and len(seen) < limit:
            tensor = pending.pop()
            if id(tensor) in wanted:
                return wanted[id(tensor)]
            node = producer(tensor)
            if node is None or id(node) in self._walls or self._place(tensor) <= earliest:
                continue
            for source in reversed(reads(node)):
                if id(source) not in seen and not isinstance(source, gs.Constant):
                    seen.add(id(source))
                    pending.append(source)
        return None

    def leads(self, starts: Sequence[gs.Tensor], to: gs.Tensor, limit: int = 4000) -> bool:
        """Whether ``to`` depends on any of ``starts`` in any way."""
        wanted = {id(tensor) for tensor in starts}
        earliest = min(self._place(tensor) for tensor in starts)
        pending, seen = [to], {id(to)}
        while pending and len(seen) < limit:
            tensor = pending.pop()
            if id(tensor) in wanted:
                return True
            node = producer(tensor)
            if node is None or self._place(tensor) <= earliest:
                continue
            for source in reads(node):
                if id(source) not in seen and not isinstance(source, gs.Constant):
                    seen.add(id(source))
                    pending.append(source)
        return False


def find_join(output: gs.Tensor, x: gs.Tensor, ancestors: Ancestors,
              exits: Mapping[int, list[gs.Tensor]]) -> Join | str:
    """The Add at which ``output`` joins the stream that ``x`` was read from, or a sentence saying why there is none.

    Args:
        exits: where the outputs of inner graphs come out in the graph around them, by identity.
    """
    pending: list[tuple[gs.Tensor, bool, tuple[gs.Tensor, ...]]] = [(output, True, ())]
    seen = {id(output)}
    blocked = "nothing adds it to the residual stream"
    steps = 0
    while pending and steps < _STEPS:
        tensor, direct, others = pending.pop(0)
        for out in exits.get(id(tensor), []):
            pending.append((out, False, others))
        for node in consumers(tensor):
            steps += 1
            joined = _joined(node, tensor, x, ancestors)
            if joined is not None:
                return Join(node, tensor, joined, direct, list(others))
            following = follow(node, tensor)
            if following is None:
                blocked = f"it goes through {node.op} (node '{node.name}') before any residual Add"
                continue
            plain = node.op in ALIASES or node.op == "Transpose"
            added = tuple(t for t in node.inputs if t is not tensor and t.name) if node.op == "Add" else ()
            for out in following:
                if id(out) not in seen:
                    seen.add(id(out))
                    pending.append((out, direct and plain, others + added))
    return blocked


def addends(node: gs.Node) -> list[gs.Tensor]:
    """What ``node`` adds up, if it can be a residual Add; else nothing."""
    if node.op in SKIP_NORMS:
        return list(node.inputs[:2])
    return list(node.inputs) if node.op in ("Add", "Sum") and node.domain in (None, "", "ai.onnx") else []


def _joined(node: gs.Node, tensor: gs.Tensor, x: gs.Tensor, ancestors: Ancestors) -> gs.Tensor | None:
    """The residual operand, where ``node`` adds ``tensor`` to what ``x`` was computed from."""
    for operand in addends(node):
        if operand is not tensor and fold(operand) is None:
            found = ancestors.any(terms(operand), x)
            if found is not None and not _passed_by(operand, node, ancestors):
                return operand
    return None


def _passed_by(residual: gs.Tensor, join: gs.Node, ancestors: Ancestors) -> bool:
    """Whether the stream goes on from ``residual`` itself: a later Add joins to it what was made of the sum.

    So do positions scaled by a small network: they are added to queries and keys alone.
    """
    readers = [node for node in consumers(residual) if node is not join and (node.op in SKIP_NORMS or node.op == "Add")]
    return any(ancestors.leads(join.outputs, value) for node in readers for value in node.inputs if value is not residual)


def terms(operand: gs.Tensor, depth: int = 4) -> list[gs.Tensor]:
    """``operand`` and, where it is a sum, its terms; casts, reshapes and constant factors looked through."""
    found = [operand]
    node = producer(operand)
    if node is None or depth == 0:
        return found
    if node.op in SKIP_NORMS:
        return found  # a new stream starts behind a norm
    if node.op in ALIASES or node.op == "Transpose":
        return found + terms(node.inputs[0], depth)
    if node.op in ("Add", "Sum"):
        return found + [term for value in node.inputs if fold(value) is None for term in terms(value, depth - 1)]
    if node.op == "Mul":
        parts = [value for value in node.inputs if fold(value) is None]
        return found + (terms(parts[0], depth - 1) if len(parts) == 1 else [])
    return found


def follow(node: gs.Node, tensor: gs.Tensor) -> list[gs.Tensor] | None:
    """The values through which ``tensor`` goes on, or None where it stops being the same stream."""
    op = node.op
    if op in ALIASES or op in NORMS or op in _CARRIERS:
        return [out for out in node.outputs if out.name]
    if op in ("Add", "Mul", "Div", "Max", "BatchNormalization") or op in _NORM_PARTS:
        return list(node.outputs)
    return None
