"""Where the biases of a block are, and how one is taken away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.builder import Builder
from ...graph.constant import Folded, fold
from ...graph.edit import consumers, is_output, producer, remove_dead, set_input, set_inputs, substitute
from ...graph.linear import MICROSOFT, Linear
from ...graph.model import Model
from ...graph.norm import Norm, read_norm
from ...graph.residual import SKIP_NORMS
from ...graph.shapes import ALIASES
from .linear_bias import bias_at

Array = npt.NDArray[Any]
_STEPS = 8
_HOLDS = frozenset({"Gemm", "FusedGemm", "Conv", "FusedConv"})
_PLAIN = {"BiasGelu": "Gelu", "FastGelu": "FastGelu"}


@dataclass(eq=False)
class BiasPlace:
    """A constant that is added in front of the activation.

    Attributes:
        node, index: where it is read.
        parts: leaf number → what of it reaches that leaf, ``[d_ff]``.
    """

    node: gs.Node
    index: int
    parts: dict[int, Array]


def inner_places(block: FFNBlock) -> list[BiasPlace]:
    """The biases of up and gate; a fused gate-up has one."""
    found = []
    leaves = block.region.leaves
    for linear in {id(leaf.linear): leaf.linear for leaf in leaves}.values():
        place = _held_by(linear)
        if place is not None and linear.bias is not None:
            whole = linear.bias().astype(np.float64)
            parts = {number: whole if leaf.columns is None else whole[leaf.columns]
                     for number, leaf in enumerate(leaves) if leaf.linear is linear}
            found.append(BiasPlace(*place, parts))
    starts = {id(leaf.tensor): number for number, leaf in enumerate(leaves)}
    for node in block.region.steps:
        for index, value in enumerate(node.inputs):
            folded = fold(value) if (id(node), index) in block.region.bias_values else None
            number = _leaf(node.inputs[1 - index], starts) if folded is not None else None
            if folded is not None and number is not None and not folded.overridable:
                found.append(BiasPlace(node, index, {number: _vector(folded, block.d_ff)}))
    return found


def take_away(graph: gs.Graph, node: gs.Node, index: int) -> None:
    """Add nothing any more where ``node`` reads a constant as its input ``index``."""
    if node.op == "Add":
        substitute(graph, node.outputs[0], node.inputs[1 - index])
        remove_dead(graph, [node])
        return
    set_inputs(node, node.inputs[:index])
    if node.op in _PLAIN:
        node.op, node.domain = _PLAIN[node.op], MICROSOFT


def add_constant(model: Model, graph: gs.Graph, node: gs.Node, index: int, extra: Array) -> None:
    """Add ``extra`` ``[d]`` to the constant that ``node`` reads as its input ``index``."""
    folded = fold(node.inputs[index])
    assert folded is not None
    factor = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    old = folded.load().astype(np.float64)
    total = np.broadcast_to(old.reshape(-1), extra.shape) + extra / factor
    shape = (*folded.shape[:-1], len(extra)) if folded.size != len(extra) else folded.shape
    build = Builder(model, graph, node.name or "prune_bias", folded.onnx_type)
    set_input(node, index, build.constant(total.reshape(shape), "later_bias"))


def outer_place(block: FFNBlock) -> tuple[gs.Node, int] | None:
    """Where the bias of the down projection is read; None where there is none, or in a form that is not edited here."""
    join, at = block.join, 3 if "Simplified" in block.join.node.op else 4
    if join.node.op in SKIP_NORMS and join.direct and len(join.node.inputs) > at and join.node.inputs[at].name:
        return join.node, at
    if block.down.linear.bias is not None:
        return _held_by(block.down.linear)
    tensor = block.output
    for _ in range(_STEPS if block.down.extra_bias else 0):
        node = producer(tensor)
        if node is None or node is block.down.linear.node:
            return None
        if node.op == "Add":
            index = next((at for at, value in enumerate(node.inputs) if fold(value) is not None), None)
            return None if index is None else (node, index)
        tensor = node.inputs[0]
    return None


def norm_of(graph: gs.Graph, total: gs.Tensor) -> Norm | None:
    """The norm with a shift that alone reads ``total``."""
    if is_output(graph, total):
        return None
    pending, seen = [total], 0
    while pending and seen < 2 * _STEPS:
        tensor = pending.pop(0)
        for node in consumers(tensor):
            seen += 1
            norm = read_norm(node)
            if norm is not None and norm.input is total and norm.shift_at is not None and norm.shift is not None:
                inside = {id(each) for each in norm.nodes}
                return norm if all(id(reader) in inside for reader in consumers(total)) else None
            pending += [out for out in node.outputs if out.name]
    return None


def _held_by(linear: Linear) -> tuple[gs.Node, int] | None:
    place = bias_at(linear)
    if place is None and linear.kind in _HOLDS and len(linear.node.inputs) > 2 and linear.node.inputs[2].name:
        place = linear.node, 2
    if place is None or linear.fused_activation is not None:
        return None
    folded = fold(place[0].inputs[place[1]])
    return None if folded is None or folded.overridable else place


def _leaf(tensor: gs.Tensor, starts: Mapping[int, int]) -> int | None:
    """The leaf that ``tensor`` is, casts and reshapes looked through."""
    for _ in range(_STEPS):
        if id(tensor) in starts:
            return starts[id(tensor)]
        node = producer(tensor)
        if node is None or (node.op not in ALIASES and node.op != "Transpose"):
            return None
        tensor = node.inputs[0]
    return None


def _vector(folded: Folded, width: int) -> Array:
    return np.broadcast_to(folded.load().astype(np.float64).reshape(-1), (width,))
