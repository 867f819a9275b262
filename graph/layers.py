"""Layers: an FFN block with the attention in front of it, from one place on the residual stream to the next.

    pre-norm    r ──► Add(r, attention(norm r)) ──► Add(·, ffn(norm ·)) ──►
    post-norm   r ──► norm Add(r, attention r)  ──► norm Add(·, ffn ·)  ──►
    parallel    r ──► Add(r, attention(norm r), ffn(norm r)) ──►
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from .attention import Attention, find_attention
from .block import FFNBlock
from .constant import remembering
from .edit import consumers, is_output, producer
from .model import Model
from .norm import read_norm
from .rejection import Rejection
from .residual import SKIP_NORMS, Ancestors, terms
from .shapes import root
from .sort import topological

_NORM_NODES = 16


@dataclass(eq=False)
class Layer:
    """One layer.

    Attributes:
        block: its FFN (the first of its experts, where these are blocks of their own).
        attention: its attention sublayers in order of execution: the one over its own stream, then those over others.
        end: post-norm only: the normalized value that the next layer reads; None where the sum itself goes on.
    """

    block: FFNBlock
    attention: list[Attention]
    end: gs.Tensor | None = None

    @property
    def start(self) -> gs.Tensor:
        """The residual stream in front of it."""
        return self.attention[0].residual

    def settle(self) -> None:
        """Follow the values that other rewrites have replaced since it was found."""
        self.block.settle()
        for each in self.attention:
            each.settle()


@remembering()
def find_layers(model: Model, blocks: Iterable[FFNBlock]) -> tuple[dict[int, Layer], list[Rejection]]:
    """For each of ``blocks`` that has attention in front of it its layer, by the block's index; and attention that has no block.

    Attention belongs to the first block that its sum leads to, or that is added to the same residual (parallel blocks). Where
    the blocks between two attention sublayers of one stream are gone, the one further in front has none.
    """
    attention, rejected = find_attention(model)
    positions: dict[int, int] = {}
    for _, graph in reversed(model.graphs()):
        for node in topological(graph.nodes):
            positions[id(node)] = len(positions)
    ancestors = Ancestors(positions, ())
    in_order = sorted(blocks, key=lambda block: positions.get(id(block.join.node), 0))
    owned: dict[int, list[Attention]] = {}
    for each in attention:
        owner = next((block for block in in_order if block.path == each.path and _owns(block, each, ancestors)), None)
        if owner is None:
            rejected.append(Rejection(each.output.name, "attention with no FFN block behind it"))
            continue
        if not each.crosses:
            rejected += [Rejection(other.output.name, "its FFN block is gone") for other in owned.pop(owner.index, [])]
        owned.setdefault(owner.index, []).append(each)
    layers = {block.index: Layer(block, owned[block.index]) for block in in_order if block.index in owned}
    for layer in layers.values():
        layer.end = _normed_end(layer)
    return layers, rejected


def _owns(block: FFNBlock, attention: Attention, ancestors: Ancestors) -> bool:
    if ancestors.leads(attention.stream.outputs[:1] + attention.stream.outputs[3:4], block.join.node.outputs[0]):
        return True
    beside = {id(output) for output in block.join.node.outputs if output.name}
    return (any(id(term) in beside for term in terms(attention.residual))
            and not ancestors.leads(block.join.node.outputs, attention.core.outputs[0]))


def _normed_end(layer: Layer) -> gs.Tensor | None:
    """The norm of the layer's sum, where there is one on the stream itself: the FFN's residual is a norm of attention's sum."""
    stream, join = layer.attention[-1].stream, layer.block.join
    if stream is join.node:
        return None
    middle = root(join.residual)
    if stream.op in SKIP_NORMS:
        between = middle is stream.outputs[0]
    else:
        node = producer(middle)
        norm = read_norm(node) if node is not None else None
        between = norm is not None and root(norm.input) is root(stream.outputs[0])
    if not between:
        return None
    if join.node.op in SKIP_NORMS:
        return None if any(output.name and output.outputs for output in join.node.outputs[1:]) else join.node.outputs[0]
    return _norm_of(layer.block.graph, join.node.outputs[0])


def _norm_of(graph: gs.Graph, total: gs.Tensor) -> gs.Tensor | None:
    """The output of the norm that alone reads ``total``."""
    pending, seen = [total], 0
    while pending and seen < _NORM_NODES:
        tensor = pending.pop(0)
        for node in consumers(tensor):
            seen += 1
            norm = read_norm(node)
            if norm is not None and norm.input is total:
                inside = {id(each) for each in norm.nodes}
                alone = all(id(reader) in inside for reader in consumers(total)) and not is_output(graph, total)
                return norm.output if alone else None
            pending += [out for out in node.outputs if out.name]
    return None
