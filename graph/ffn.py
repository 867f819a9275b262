"""FFN blocks: what one is, and how all of them are found by structure (see docs/detection.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from .activation import Activation, name_activation
from .constant import remembering
from .edges import Edges, block_edges
from .edit import current, producer, remove_dead, take_over
from .linear import Linear, read_linear
from .model import Model
from .pointwise import Array
from .region import Region, Walker
from .rejection import Refusal, Rejection
from .residual import Ancestors, Join, find_join
from .shapes import root
from .sort import topological


@dataclass(eq=False)
class Projection:
    """A linear of a block, or those of its columns that the block uses as its up or gate projection.

    Attributes:
        linear: where the weight is.
        columns: which columns, None for all.
        extra_bias: constants added to the output behind the linear.
    """

    linear: Linear
    columns: npt.NDArray[np.int64] | None = None
    extra_bias: list[Callable[[], Array]] = field(default_factory=list)

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.linear.d_in

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.linear.d_out if self.columns is None else len(self.columns)

    @property
    def has_bias(self) -> bool:
        """Whether anything is added."""
        return self.linear.bias is not None or bool(self.extra_bias)

    def weight(self) -> Array:
        """A fresh array ``[d_in, d_out]`` (``[experts, d_in, d_out]`` if packed) in the block's type."""
        matrix = self.linear.weight()
        return matrix if self.columns is None else np.ascontiguousarray(matrix[..., self.columns])

    def bias(self) -> Array | None:
        """A fresh array ``[d_out]`` (``[experts, d_out]`` if packed), all constants added up, or None where there is none."""
        total: Array | None = None
        if self.linear.bias is not None:
            total = self.linear.bias()
            total = total if self.columns is None else total[self.columns]
        for extra in self.extra_bias:
            addend = extra().reshape((-1,) if self.linear.experts == 1 else (self.linear.experts, -1))
            total = addend if total is None else (total + addend).astype(total.dtype)
        return total


@dataclass(eq=False)
class FFNBlock:
    """One feed-forward block as it runs in the graph: ``y = down(act(gate x) ∘ up x) + b`` or ``y = down(act(up x)) + b``.

    Attributes:
        index: its place in ``inspect`` of the file.
        name: from the names of its nodes.
        path: the graph it is in (``main`` or a subgraph path); graph: that graph's view.
        input: ``x [*, d_model]``; output: ``y [*, d_out]``, bias included (features on ``axis``).
        up, down: projections; gate: the one under the activation in a gated block, else None.
        activation: name and form; region: the nodes between, as a function.
        join: where and how it reaches the residual stream.
        parallel: it reads what attention reads.
        experts: matrices packed in one weight. shares_weights_with: index of the first block with the same weights.
    """

    index: int
    name: str
    path: str
    graph: gs.Graph
    input: gs.Tensor
    output: gs.Tensor
    up: Projection
    gate: Projection | None
    down: Projection
    activation: Activation
    region: Region
    join: Join
    nodes: list[gs.Node]
    parallel: bool = False
    shares_weights_with: int | None = None

    @property
    def d_model(self) -> int:
        """Width of the input."""
        return self.up.d_in

    @property
    def d_ff(self) -> int:
        """Intermediate width (half of a fused gate-up)."""
        return self.down.d_in

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.down.d_out

    @property
    def gated(self) -> bool:
        """Whether two projections are multiplied."""
        return self.gate is not None

    @property
    def axis(self) -> int:
        """Where the features are, counted from the end: −1, or the channel axis of convolutions."""
        return self.down.linear.axis

    @property
    def experts(self) -> int:
        """Matrices packed in one weight."""
        return self.down.linear.experts

    @property
    def hidden(self) -> gs.Tensor:
        """``h [*, d_ff]``, the value that the down projection reads."""
        return self.region.output

    @property
    def onnx_type(self) -> int:
        """Element type of x and y."""
        return self.up.linear.onnx_type

    @property
    def quantized(self) -> bool:
        """Whether any of its weights is stored as integers."""
        return any(linear.quantized for linear in self.linears())

    @property
    def down_bias(self) -> bool:
        """Whether a constant is added behind the down projection (also inside a SkipLayerNormalization)."""
        fused = self.join.node.op.startswith("Skip") and len(self.join.node.inputs) > 4 and self.join.direct
        return self.down.has_bias or bool(fused and self.join.node.inputs[-1].name)

    def linears(self) -> list[Linear]:
        """Its linears, a fused gate-up once."""
        found = [self.up.linear, *([self.gate.linear] if self.gate else []), self.down.linear]
        return list({id(linear): linear for linear in found}.values())

    @property
    def parameters(self) -> int:
        """Numbers in its weights and biases."""
        extra = sum(projection.d_out for projection in (self.up, self.gate, self.down)
                    if projection and projection.linear.bias is None and projection.has_bias)
        return sum(linear.parameters for linear in self.linears()) + extra

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds for one row (of one expert)."""
        return sum(linear.d_in * linear.d_out for linear in self.linears())

    def settle(self) -> None:
        """Follow the values of the block that other rewrites have replaced since it was found."""
        self.input, self.output = current(self.input), current(self.output)
        self.join.branch, self.join.residual = current(self.join.branch), current(self.join.residual)
        self.region.output = current(self.region.output)
        for linear in self.linears():
            linear.input, linear.output = current(linear.input), current(linear.output)
        for leaf in self.region.leaves:
            leaf.tensor = current(leaf.tensor)

    def replace(self, y: gs.Tensor) -> None:
        """Put ``y`` (as wide and as long as ``output``) in the place of what the block gives.

        ``output`` keeps its name and its readers; what only the block needed is removed. What other nodes read from inside
        the block stays, and with it what computes it.
        """
        old = producer(self.output)
        take_over(self.output, y)
        remove_dead(self.graph, [old] if old is not None else [])

    def hidden_from(self, up: Array, gate: Array | None = None) -> Array:
        """``h`` in float64 from the projections' outputs with their biases, ``[*, d_ff]`` each; inner norms left out."""
        if self.gate is None:
            return self.region.evaluate([up], biased=True)
        leaves = [up, up]
        leaves[self.activation.gate] = gate if gate is not None else up
        return self.region.evaluate(leaves, biased=True)


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
