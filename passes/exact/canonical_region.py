"""What lies between the projections of a block, in its canonical form: a fused gate-up cut by one Split, one activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.broadcast import rank
from ...graph.builder import Builder
from ...graph.constant import fold, integers
from ...graph.edit import consumers, is_output, producer, remove_dead, take_over
from ...graph.linear import Linear
from ...graph.pointwise import POINTWISE, Array
from ...graph.types import numpy_type
from ..base import Context
from .activation_chains import CHAINS, compute, numbers
from .alone import executed_alone
from .canonical_linear import copy_nodes

_SHAPERS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"})
_SILENT = frozenset({"Identity", "Dropout", "Cast", "CastLike"})
_CUTTERS = frozenset({"Split", "Slice", "Gather", "SequenceAt"})
GRID = np.concatenate([np.linspace(-12, 12, 97), [-100, -30, 30, 100]])


@dataclass
class Core:
    """The nodes of a region that compute: reshapes in front of them and behind them left out.

    Attributes:
        starts: one value for each leaf of the region. end: what they compute. nodes: producers first.
    """

    starts: list[gs.Tensor]
    end: gs.Tensor
    nodes: list[gs.Node]


def core_of(block: FFNBlock) -> Core | None:
    """The core of a block's region; None where other nodes read from inside it."""
    region = block.region
    steps = {id(node) for node in region.steps}
    starts = [_forwards(leaf.tensor, steps) for leaf in region.leaves]
    end = region.output
    node = producer(end)
    while node is not None and id(node) in steps and node.op in _SHAPERS and all(end is not start for start in starts):
        end = node.inputs[0]
        node = producer(end)
    inside: set[int] = set()
    pending = [end]
    while pending:
        tensor = pending.pop()
        node = producer(tensor)
        if any(tensor is start for start in starts) or node is None or id(node) not in steps or id(node) in inside:
            continue
        inside.add(id(node))
        pending += node.inputs
    nodes = [node for node in region.steps if id(node) in inside]
    values = [tensor for node in nodes for tensor in node.outputs if tensor is not end and tensor.name]
    if any(is_output(block.graph, tensor) or any(id(reader) not in inside for reader in consumers(tensor)) for tensor in values):
        return None
    return Core(starts, end, nodes)


def _forwards(tensor: gs.Tensor, steps: set[int]) -> gs.Tensor:
    while True:
        readers = [node for node in consumers(tensor) if id(node) in steps]
        if len(readers) != 1 or readers[0].op not in _SHAPERS or readers[0].inputs[0] is not tensor:
            return tensor
        tensor = readers[0].outputs[0]


def best_core(build: Builder, block: FFNBlock, core: Core, context: Context, *, anew: bool) -> gs.Tensor | None:
    """The canonical chain in the place of ``core``'s nodes, not connected yet; None where those stay.

    It is taken where its numbers are those of the region and ONNX Runtime executes fewer nodes for it than for the
    region's own (with ``anew``: no more).
    """
    before = len(build.graph.nodes)
    values = chain(build, block, core.starts, context)
    if values is None:
        return None
    made = list(build.graph.nodes[before:])
    axes = 2 if any(leaf.linear.kind in ("Gemm", "FusedGemm") for leaf in block.region.leaves) else 3
    biases = [node for node in map(producer, core.starts) if node is not None and node.op == "Add" and _adds_vector(node)]
    kind = block.onnx_type
    own = executed_alone(build.model, [*biases, *core.nodes], core.end, kind, axes, context)
    new = executed_alone(build.model, [*biases, *made], values, kind, axes, context)
    if own is not None and new is not None and (new < own or (anew and new == own)):
        return values
    remove_dead(build.graph, made)
    return None


def own_core(build: Builder, core: Core, starts: Sequence[gs.Tensor]) -> gs.Tensor:
    """A copy of the core's own nodes that reads ``starts``, not connected yet."""
    values = {id(old): new for old, new in zip(core.starts, starts, strict=True)}
    return copy_nodes(build, core.nodes, values)[id(core.end)]


def put(build: Builder, core: Core, value: gs.Tensor) -> None:
    """Let ``value`` take the place of what ``core`` computes."""
    old = producer(core.end)
    take_over(core.end, value)
    remove_dead(build.graph, [old] if old is not None else [])


def chain(build: Builder, block: FFNBlock, starts: Sequence[gs.Tensor], context: Context) -> gs.Tensor | None:
    """The activation of ``block`` (and the product with the gate) as the chain of its name; None where that is not what
    the region computes."""
    activation, region = block.activation, block.region
    emit = CHAINS.get(activation.name)
    if emit is None or region.inner_norm or any(leaf.linear.fused_activation for leaf in region.leaves):
        return None
    if not all(_is_plain(node, block.onnx_type) and _keeps_axes(node) for node in region.steps):
        return None
    biases = _leaf_biases(block)
    if biases is None:
        return None
    before = len(build.graph.nodes)
    z = [start if bias is None else build.op("Add", start, bias, hint="bias") for start, bias in zip(starts, biases, strict=True)]
    first = len(build.graph.nodes)
    h = emit(build, numbers(build, context.memo), z[activation.gate])
    if activation.value is not None:
        h = build.op("Mul", h, z[activation.value], hint="gated")
    if _agrees(block, build.graph.nodes[first:], z, h):
        return h
    made = list(build.graph.nodes[before:])
    own = {id(node) for node in made}
    remove_dead(build.graph, made, lambda node: id(node) in own)  # what gives ``starts`` may be new, and unread as yet
    return None


def _is_plain(node: gs.Node, onnx_type: int) -> bool:
    if node.op == "Cast":
        return int(node.attrs.get("to", 0)) == onnx_type
    return node.op in _SHAPERS or node.op == "Identity" or (node.domain or "", node.op) in POINTWISE


def _keeps_axes(node: gs.Node) -> bool:
    """Whether the constants that ``node`` reads surely add no axis to what it computes."""
    constants = [folded for folded in map(fold, node.inputs) if folded is not None]
    if node.op in _SHAPERS or all(len(each.shape) <= 1 for each in constants):
        return True
    axes = max((rank(tensor) or 0 for tensor in node.inputs if fold(tensor) is None), default=0)
    return all(len(each.shape) <= axes for each in constants)


def _leaf_biases(block: FFNBlock) -> list[gs.Tensor | None] | None:
    """The constant that the region adds to each leaf, as it is stored; None where it is stored in another form.

    What was added before the columns of the leaf were cut out is in the leaf already."""
    found: list[gs.Tensor | None] = []
    for number, leaf in enumerate(block.region.leaves):
        folded = [each for each in block.region.biases.get(number, []) if all(each is not other for other in leaf.added)]
        if len(folded) > 1 or any(each.nodes or not each.sources or each.experts != 1 for each in folded):
            return None
        found.append(folded[0].sources[0] if folded else None)
    return found


def _agrees(block: FFNBlock, nodes: Sequence[gs.Node], z: Sequence[gs.Tensor], h: gs.Tensor) -> bool:
    """Whether ``nodes`` compute on a grid what the region does, up to the rounding of its constants."""
    if len(z) == 1:
        grids: list[Array] = [GRID[:, None]]
    else:
        grids = [GRID[::3, None, None], np.asarray([-40, -2.5, -0.3, 0, 1, 9])[None, :, None]]
    own = block.region.evaluate(grids, biased=True)
    new = compute(nodes, {id(value): grid for value, grid in zip(z, grids, strict=True)}, h)
    half = block.onnx_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    precision = 2.0 ** (-10 if block.onnx_type == onnx.TensorProto.FLOAT16 else -7 if half else -23)
    if block.onnx_type == onnx.TensorProto.DOUBLE:
        precision = float(np.finfo(numpy_type(block.onnx_type)).eps)
    error = np.abs(own - new)
    return bool(np.isfinite(own).all() and (error <= (4 if half else 16) * precision * np.maximum(1, np.abs(own))).all())


def _adds_vector(node: gs.Node) -> bool:
    return any(fold(tensor) is not None for tensor in node.inputs)


@dataclass
class Cut:
    """How a fused gate-up is cut.

    Attributes:
        fused: the value that is cut. axis: of the features in it. order: columns of the linear in the order of the leaves.
    """

    linear: Linear
    fused: gs.Tensor
    axis: int
    order: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def halves(self) -> tuple[int, int] | None:
        """Which leaf holds the first half of the columns and which the second; None where they are mixed."""
        count = len(self.order)
        if np.array_equal(self.order, np.arange(count)):
            return 0, 1
        return (1, 0) if np.array_equal(np.roll(self.order, count // 2), np.arange(count)) else None


def cut_of(block: FFNBlock) -> Cut | None:
    """How the fused gate-up of ``block`` is cut; None where it has none, or the cut is of a form that stays."""
    leaves = block.region.leaves
    if len(leaves) != 2 or leaves[0].linear is not leaves[1].linear:
        return None
    if any(leaf.columns is None for leaf in leaves):
        return None
    order = np.concatenate([leaf.columns for leaf in leaves])
    linear = leaves[0].linear
    if len(order) != linear.d_out or not np.array_equal(np.sort(order), np.arange(len(order))):
        return None
    found = [_cutter(leaf.tensor) for leaf in leaves]
    if found[0] is None or found[1] is None or found[0][0] is not found[1][0] or found[0][1] != found[1][1]:
        return None
    return Cut(linear, *found[0], order)


def _cutter(tensor: gs.Tensor) -> tuple[gs.Tensor, int] | None:
    """The value that ``tensor`` was cut from and along which axis."""
    node = producer(tensor)
    if node is None or node.op not in _CUTTERS:
        return None
    if node.op == "SequenceAt":
        node = producer(node.inputs[0])
        if node is None:
            return None
    if node.op == "Slice":
        axes = integers(node.inputs[3]) if len(node.inputs) > 3 else node.attrs.get("axes")
        return None if not axes else (node.inputs[0], int(axes[0]))
    return node.inputs[0], int(node.attrs.get("axis", 0))


def is_split(block: FFNBlock, cut: Cut) -> bool:
    """Whether one Split gives both halves already."""
    nodes = [producer(leaf.tensor) for leaf in block.region.leaves]
    return nodes[0] is nodes[1] and nodes[0] is not None and nodes[0].op == "Split" and len(nodes[0].outputs) == 2


def split(build: Builder, fused: gs.Tensor, axis: int, halves: tuple[int, int]) -> list[gs.Tensor]:
    """The value of each leaf, cut from ``fused`` by one Split."""
    outputs = [build.value("gate_up_split") for _ in halves]
    attrs: dict[str, Any] = {"num_outputs": 2} if build.model.opset >= 18 else {}
    build.nodes("Split", [fused], list(outputs), axis=axis, **attrs)
    return [outputs[halves.index(number)] for number in range(2)]
