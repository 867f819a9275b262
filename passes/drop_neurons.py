"""drop-neurons: neurons that provably do nothing, or what another does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from ..graph.block import FFNBlock
from ..graph.builder import Builder
from ..graph.constant import fold
from ..graph.edit import consumers, is_output, producer, remove_dead, replace_uses, set_input
from ..graph.ffn import find_ffn_blocks
from ..graph.linear import Linear
from ..graph.model import Model
from ..graph.shapes import last_dimension
from .base import Context, Pass, PassResult, Refused
from .exact.linear_bias import add_to_bias, is_fixed
from .exact.neuron_proof import Proof, prove
from .exact.neuron_range import Range
from .exact.neuron_weights import Indices, NeuronWeight
from .exact.sharing import is_read_elsewhere, is_shared, shows_inside


@dataclass(frozen=True)
class DropNeurons(Pass):
    """Drop neurons of FFN blocks whose contribution to the output is provably zero, constant, or another's.

        y = Σᵢ hᵢ w_downᵢ + b,   hᵢ = act(gᵢ) · uᵢ   (no gᵢ where the block is not gated)

        w_downᵢ = 0, or hᵢ = 0                         →  without i
        hᵢ = c whatever x is (w_upᵢ = 0)               →  without i, b + c w_downᵢ
        hᵢ = hⱼ (equal weights and biases)             →  without j, w_downᵢ + w_downⱼ
        zᵢ ≤ 0 for every x, under a ReLU               →  without i
        zᵢ ≥ 0 for every i and x, under a ReLU         →  no ReLU

    The last two are proved where the block reads a norm: ‖x̂‖₂ ≤ √d, so |zᵢ − cᵢ| ≤ √d ‖γ ∘ wᵢ‖ with cᵢ = β·wᵢ + bᵢ,
    widened by what float32 may round. What that says of hᵢ is carried through the activation node by node.

    Does not fire where the number left would not be a multiple of ``multiple`` (then as many stay as make it one), where a
    weight is shared, quantized, packed or an input, on neurons that hold an infinity or NaN (0 · ∞ is NaN), where the
    intermediate value is read elsewhere, where the neurons are normed together, or where their number is written into a
    Reshape.
    """

    name: ClassVar[str] = "drop-neurons"
    exact: ClassVar[bool] = True
    multiple: int = field(default=16, metadata={"help": "keep the width a multiple of this, which matrix kernels like"})

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError("multiple must be 1 or more")

    def run(self, model: Model, context: Context) -> PassResult:
        """Look at every block once."""
        fired = 0
        refused = []
        for block in context.ledger.blocks.values() if context.ledger is not None else find_ffn_blocks(model):
            block.settle()
            reason = _reason_against(block)
            if reason is not None:
                refused.append(Refused(reason, block.output.name, block.index))
                continue
            outcome = _rewrite(model, block, self.multiple)
            if isinstance(outcome, Refused):
                refused.append(Refused(outcome.reason, outcome.value, block.index))
            else:
                fired += outcome
        return self.result(fired, refused)


def _reason_against(block: FFNBlock) -> str | None:
    if not block.d_ff or not block.d_model:
        return "it has no neurons"
    if any(linear.packed or linear.gathered for linear in block.linears()):
        return "its weights have a third axis, for experts"
    if block.quantized:
        return "its weights are quantized"
    if any(projection is not None and projection.columns is not None for projection in (block.up, block.gate)):
        return "its gate and up projections are one matrix"
    if any(linear.kind not in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm") for linear in block.linears()):
        return "its linears are of a form that is not cut"
    if any(linear.node.attrs.get("alpha", 1.0) != 1 for linear in block.linears()):
        return "its products are scaled by alpha"
    if any(linear.overridable for linear in block.linears()):
        return "a weight is an input that the caller may override"
    if any(is_shared(linear) for linear in block.linears()):
        return "a weight is shared with something else"
    if block.region.inner_norm:
        return "its neurons are normed together"
    if block.up.extra_bias or (block.gate is not None and block.gate.extra_bias):
        return "a bias is added apart from its linear"
    inside = {id(node) for node in block.region.nodes} | {id(node) for linear in block.linears() for node in linear.nodes}
    for node in block.region.nodes:
        if node.op == "Reshape" and last_dimension(node) not in (0, -1):
            return "the number of neurons is written into a Reshape"
        if any(is_output(block.graph, tensor) for tensor in node.outputs) or any(
                id(reader) not in inside for tensor in node.outputs for reader in consumers(tensor)):
            return "its intermediate value is read elsewhere"
        if any(_size(tensor) > 1 and node.op != "Reshape" for tensor in node.inputs):
            return "its activation has numbers of its own for each neuron"
    for linear in block.linears():
        if shows_inside(block.graph, linear):
            return "its intermediate value is read elsewhere"
        if not is_fixed(linear):
            return "a bias is an input that the caller may override"
        if linear.bias is not None and _bias_at(linear) is None:
            return "a bias is of a form that is not cut"
    for projection in (block.up, block.gate):
        value = projection.linear.output if projection is not None else None
        if value is not None and (is_output(block.graph, value) or any(id(node) not in inside for node in consumers(value))):
            return "its intermediate value is read elsewhere"
    return None


def _size(tensor: gs.Tensor) -> int:
    folded = fold(tensor) if tensor.name else None
    return 0 if folded is None else int(np.prod(folded.shape, dtype=np.int64))


def _rewrite(model: Model, block: FFNBlock, multiple: int) -> int | Refused:
    """Drop what can be dropped; returns how many neurons and activations that were."""
    found = prove(block)
    kept = _kept(block.d_ff, found, multiple)
    if len(kept) < block.d_ff:
        if not _shrinks(block, found, kept):
            return Refused("a bias is shared with something else, so that the file would grow", block.output.name)
        _drop(model, block, found, kept)
    return block.d_ff - len(kept) + _drop_idle(block, found.ranges, kept)


def _kept(width: int, found: Proof, multiple: int) -> Indices:
    """The neurons that stay: as many as make their number a multiple, at least one."""
    doubles = {other for others in found.same.values() for other in others}
    droppable = sorted(found.gone | set(found.constant) | doubles)
    dropped = set(droppable[:_fitting(width, len(droppable), multiple)])
    return np.asarray([neuron for neuron in range(width) if neuron not in dropped], np.int64)


def _drop(model: Model, block: FFNBlock, found: Proof, kept: Indices) -> None:
    left = set(kept.tolist())
    same = {neuron: [other for other in others if other not in left] for neuron, others in found.same.items()}
    constants = {neuron: value for neuron, value in found.constant.items() if neuron not in left}
    if constants:
        index = np.asarray(sorted(constants), np.int64)
        rows = NeuronWeight.of(block.down.linear, down=True).take(index).astype(np.float64)
        add_to_bias(model, block.graph, block.down.linear, np.asarray([constants[int(i)] for i in index]) @ rows)
    for projection in (block.up, block.gate):
        if projection is not None:
            _cut(model, block.graph, projection.linear, kept, down=False)
    _cut(model, block.graph, block.down.linear, kept, down=True, added={each: others for each, others in same.items() if others})
    _narrow(block, block.d_ff, len(kept))


def _fitting(width: int, droppable: int, multiple: int) -> int:
    """How many of ``droppable`` neurons go so that what is left is a multiple, and not nothing."""
    return max(0, width - max(multiple, -(-(width - droppable) // multiple) * multiple))


def _shrinks(block: FFNBlock, found: Proof, kept: Indices) -> bool:
    """Whether the file gets smaller although a bias that something else goes on reading stays beside the new one."""
    linears = [(leaf.linear, len(kept)) for leaf in block.region.leaves]
    linears += [(block.down.linear, block.d_out)] if found.constant else []
    places = [(_bias_at(linear), size) for linear, size in linears if linear.bias is not None]
    more = sum(size for place, size in places if place is not None and is_read_elsewhere(*place))
    rows = sum(leaf.linear.d_in for leaf in block.region.leaves) + block.d_out
    return more <= (block.d_ff - len(kept)) * rows


def _drop_idle(block: FFNBlock, ranges: dict[int, Range], kept: Indices) -> int:
    """Take out the ReLUs that never cut anything off, of the neurons kept."""
    idle = [node for node in block.region.steps if node.op == "Relu" and not node.domain
            and not is_output(block.graph, node.outputs[0]) and (ranges[id(node.inputs[0])].low[kept] >= 0).all()]
    for relu in idle:
        x, y = relu.inputs[0], relu.outputs[0]
        replace_uses(y, x)
        y.replaced_by = x
        remove_dead(block.graph, [relu])
    return len(idle)


def _bias_at(linear: Linear) -> tuple[gs.Node, int] | None:
    """Node and input that hold the bias, where it has one number a neuron."""
    last = linear.nodes[-1]
    places = [0, 1] if last.op == "Add" and last is not linear.node else [2]
    for index in places:
        if index < len(last.inputs) and last.inputs[index].name:
            folded = fold(last.inputs[index])
            if folded is not None and not folded.overridable and _size(last.inputs[index]) == linear.d_out:
                return last, index
    return None


def _cut(model: Model, graph: gs.Graph, linear: Linear, kept: Indices, *, down: bool,
         added: dict[int, list[int]] | None = None) -> None:
    build = Builder(model, graph, linear.node.name or "drop_neurons", linear.onnx_type)
    weight = build.constant(NeuronWeight.of(linear, down=down).kept(kept, added), "kept_weight")
    bias = _bias_at(linear) if not down else None
    places = [(linear.node, 1, weight)]
    if bias is not None:
        numbers = fold(bias[0].inputs[bias[1]]).load()[..., kept]  # type: ignore[union-attr]
        places.append((*bias, build.constant(numbers, "kept_bias")))
    for node, index, constant in places:
        old = producer(node.inputs[index])
        set_input(node, index, constant)
        remove_dead(graph, [old] if old is not None else [])


def _narrow(block: FFNBlock, old: int, width: int) -> None:
    """Forget what is known about the shapes of the values in between."""
    nodes = [*block.region.nodes, *(node for each in (block.up, block.gate) if each for node in each.linear.nodes)]
    for node in nodes:
        node.reshaped = True
        for tensor in node.outputs:
            if getattr(tensor, "shape", None):
                tensor.shape = [*tensor.shape[:-1], width] if tensor.shape[-1] == old else None
