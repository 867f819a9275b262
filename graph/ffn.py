"""All FFN blocks of a model, found by structure (see docs/detection.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from .activation import Activation, name_activation
from .block import FFNBlock, Projection
from .constant import remembering
from .edges import Edges, block_edges
from .edit import producer
from .linear import Linear, read_linear
from .model import Model
from .region import Region, Walker
from .rejection import Refusal, Rejection
from .residual import Ancestors, Join, find_join
from .shapes import root
from .sort import topological


@dataclass(frozen=True)
class FFNBlocks:
    """What :func:`find_ffn_blocks` returns: the blocks in order of execution, and what looked like one and is not."""

    blocks: list[FFNBlock]
    rejected: list[Rejection]

    def __iter__(self) -> Iterator[FFNBlock]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> FFNBlock:
        return self.blocks[index]


def find_ffn_blocks(model: Model) -> FFNBlocks:
    """Every FFN block of ``model``, in all its graphs.

    Model-local functions are inlined (for good) where a block lies inside one.
    """
    if model.proto.functions and not model.touched:
        inlined = model.with_functions_inlined()
        if len(_search(inlined).blocks) > len(_search(model).blocks):
            model.inline_functions()
    return _search(model)


@remembering()
def _search(model: Model) -> FFNBlocks:
    graphs = [(path, graph, topological(graph.nodes)) for path, graph in model.graphs()]
    linears: dict[int, Linear] = {}
    order: list[tuple[str, gs.Graph, Linear]] = []
    positions: dict[int, int] = {}
    exits: dict[int, list[gs.Tensor]] = {}
    for _, _, nodes in reversed(graphs):  # inner graphs first: what they compute comes before the node around them
        for node in nodes:
            positions[id(node)] = len(positions)
            _note_exits(node, exits)
            linear = read_linear(node)
            if linear is not None:
                linears[id(linear.output)] = linear
    for path, graph, nodes in graphs:
        by_node = {id(linear.node): linear for linear in linears.values()}
        order += [(path, graph, by_node[id(node)]) for node in nodes if id(node) in by_node]
    walls = {id(linear.node) for linear in linears.values()}
    walker, ancestors = Walker(linears), Ancestors(positions, walls)
    found = FFNBlocks([], [])
    for path, graph, down in order:
        result = _block(path, graph, down, walker, ancestors, exits)
        if isinstance(result, Rejection):
            found.rejected.append(result)
        elif result is not None:
            found.blocks.append(result)
    _number(found.blocks)
    _mark_parallel(found.blocks, linears, ancestors)
    return found


def _note_exits(node: gs.Node, exits: dict[int, list[gs.Tensor]]) -> None:
    """Remember where the outputs of the graphs inside ``node`` come out."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            skipped = 1 if node.op == "Loop" else 0
            for inner, outer in zip(value.outputs[skipped:], node.outputs, strict=False):
                exits.setdefault(id(inner), []).append(outer)


def _block(path: str, graph: gs.Graph, down: Linear, walker: Walker, ancestors: Ancestors,
           exits: dict[int, list[gs.Tensor]]) -> FFNBlock | Rejection | None:
    region = walker.walk(down)
    value = down.output.name
    if isinstance(region, Refusal):
        if not region.linear_leaves:
            return None
        return Rejection(value, f"what it multiplies also comes from elsewhere: {region.reason} ('{region.value}')")
    if not region.leaves:
        return None
    activation = name_activation(region)
    if isinstance(activation, str):
        if len(region.leaves) == 1:
            return None  # linear after linear: no sign of an FFN
        return Rejection(value, activation)
    roots = {id(root(leaf.linear.input)) for leaf in region.leaves}
    if len(roots) > 1:
        return Rejection(value, "its two branches read different values")
    x = root(region.leaves[0].linear.input)
    join = find_join(down.output, x, ancestors, exits)
    if isinstance(join, str):
        return Rejection(value, join)
    width = region.leaves[0].linear.d_in
    if width != down.d_out:
        return Rejection(value, f"it reads {width} features of a stream and gives it {down.d_out}")
    edges = block_edges(region, down)
    if isinstance(edges, str):
        return Rejection(value, edges)
    return _assemble(path, graph, down, region, activation, join, edges)


def _assemble(path: str, graph: gs.Graph, down: Linear, region: Region, activation: Activation, join: Join,
              edges: Edges) -> FFNBlock:
    projections = [Projection(leaf.linear, leaf.columns, [folded.load for folded in region.biases.get(number, [])])
                   for number, leaf in enumerate(region.leaves)]
    up = projections[activation.gate if activation.value is None else activation.value]
    gate = None if activation.value is None else projections[activation.gate]
    return FFNBlock(0, _name(up.linear, down), path, graph, edges.input, edges.output, up, gate,
                    Projection(down, None, edges.extra_bias), activation, region, join, edges.nodes)


def _name(up: Linear, down: Linear) -> str:
    """The common path of the two linears' node names, e.g. ``/encoder/layer.3``; else that of their weights."""
    names = [[up.node.name, down.node.name]]
    if up.source is not None and down.source is not None:
        names.append([up.source.name, down.source.name])
    for first, second in names:
        separator = "/" if "/" in first else "."
        common = []
        for a, b in zip(first.split(separator), second.split(separator), strict=False):
            if a != b:
                break
            common.append(a)
        if "".join(common):
            return separator.join(common)
    return ""


def _number(blocks: list[FFNBlock]) -> None:
    first: dict[tuple[object, ...], int] = {}
    taken: set[str] = set()
    for index, block in enumerate(blocks):
        block.index = index
        name = block.name or f"ffn_{index}"
        block.name = name if name not in taken else f"{name}#{index}"
        taken.add(block.name)
        keys = tuple(linear.weight_key for linear in block.linears())
        if None in keys:
            continue
        block.shares_weights_with = first.get(keys)
        first.setdefault(keys, index)


def _mark_parallel(blocks: list[FFNBlock], linears: dict[int, Linear], ancestors: Ancestors) -> None:
    """A block is parallel where a linear that is no block's, and no router, is added to the stream beside it."""
    own = {id(linear) for block in blocks for linear in block.linears()}
    for block in blocks:
        operands = [*block.join.others, *_summed(block.join.residual)]
        for operand in operands:
            linear = linears.get(id(root(operand)))
            if linear is not None and id(linear) not in own and linear.d_out == block.d_out:
                block.parallel |= ancestors.any([linear.output], block.input) is None


def _summed(operand: gs.Tensor) -> list[gs.Tensor]:
    node = producer(operand)
    if node is None or node.op != "Add":
        return []
    return [value for value in node.inputs if not isinstance(value, gs.Constant)]
