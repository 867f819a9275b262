"""drop-neurons: neurons that provably do nothing, or what another does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.constant import fold
from ..graph.edit import consumers, is_output, producer, remove_dead, replace_uses, set_input
from ..graph.ffn import FFNBlock, find_ffn_blocks
from ..graph.linear import Linear
from ..graph.model import Model
from ..graph.norm import read_norm
from ..graph.shapes import last_dimension
from .base import Context, Pass, PassResult, Refused
from .bias_rules import add_to_bias
from .neuron_weights import Indices, NeuronWeight, bound
from .sharing import is_shared

Array = npt.NDArray[Any]
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class DropNeurons(Pass):
    """Drop neurons of FFN blocks whose contribution to the output is provably zero, constant, or another's.

        y = Σᵢ hᵢ w_downᵢ + b,   hᵢ = act(gᵢ) · uᵢ   (no gᵢ where the block is not gated)

        w_downᵢ = 0, or hᵢ = 0                         →  without i
        hᵢ = c whatever x is (w_upᵢ = 0)               →  without i, b + c w_downᵢ
        hᵢ = hⱼ (equal weights and biases)             →  without j, w_downᵢ + w_downⱼ
        zᵢ ≤ 0 for every x, under a ReLU               →  without i
        zᵢ ≥ 0 for every i and x, under a ReLU         →  no ReLU

    The last two are proved where the block reads a norm: ‖x̂‖₂ ≤ √d, so |zᵢ − cᵢ| ≤ √d ‖P(γ ∘ wᵢ)‖ with cᵢ = β·wᵢ + bᵢ, P
    taking the mean away (LayerNorm) or nothing (RMSNorm); the bound is widened by what float32 may round.

    Does not fire where the number left would not be a multiple of ``multiple`` (then as many stay as make it one), where a
    weight is shared, quantized, packed or an input, where the intermediate value is read elsewhere, where the neurons are
    normed together, or where their number is written into a Reshape.
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
        for block in find_ffn_blocks(model):
            block.settle()
            reason = _reason_against(block)
            if reason is not None:
                refused.append(Refused(reason, block.output.name, block.index))
                continue
            fired += _rewrite(model, block, self.multiple)
        return self.result(fired, refused)


@dataclass
class _Findings:
    """What was proved of the neurons of a block.

    Attributes:
        gone: neurons that contribute nothing.
        constant: neurons that give ``constant[i]`` whatever goes in.
        same: neuron → others that equal it.
        all_on: no neuron is ever cut by the ReLU.
    """

    gone: set[int]
    constant: dict[int, float]
    same: dict[int, list[int]]
    all_on: bool = False


def _reason_against(block: FFNBlock) -> str | None:
    if block.experts != 1 or any(linear.gathered for linear in block.linears()):
        return "its experts are packed in one weight"
    if block.quantized:
        return "its weights are quantized"
    if any(projection is not None and projection.columns is not None for projection in (block.up, block.gate)):
        return "its gate and up projections are one matrix"
    if any(linear.kind not in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm") for linear in block.linears()):
        return "its linears are of a form that is not cut"
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


def _rewrite(model: Model, block: FFNBlock, multiple: int) -> int:
    """Drop what can be dropped; returns how many neurons that were, or 1 where the ReLU went."""
    found = _prove(block)
    if found.all_on and not found.gone:
        return _without_relu(block)
    doubles = {other: neuron for neuron, others in found.same.items() for other in others}
    droppable = sorted(found.gone | set(found.constant) | set(doubles))
    count = _fitting(block.d_ff, len(droppable), multiple)
    dropped = set(droppable[:count])
    if not dropped or len(dropped) == block.d_ff:
        return 0
    kept = np.asarray([neuron for neuron in range(block.d_ff) if neuron not in dropped], np.int64)
    same: dict[int, list[int]] = {}
    for other, neuron in doubles.items():
        if other in dropped and neuron not in dropped:
            same.setdefault(neuron, []).append(other)
    constants = {neuron: value for neuron, value in found.constant.items() if neuron in dropped and value}
    if constants:
        index = np.asarray(sorted(constants), np.int64)
        rows = NeuronWeight.of(block.down.linear, down=True).take(index).astype(np.float64)
        add_to_bias(model, block.graph, block.down.linear, np.asarray([constants[int(i)] for i in index]) @ rows)
    for projection in (block.up, block.gate):
        if projection is not None:
            _cut(model, block.graph, projection.linear, kept, down=False)
    _cut(model, block.graph, block.down.linear, kept, down=True, added=same)
    _narrow(block, len(kept))
    return len(dropped)


def _fitting(width: int, droppable: int, multiple: int) -> int:
    """How many of ``droppable`` neurons go so that what is left is a multiple, if it was one (or the next one above)."""
    left = -(-(width - droppable) // multiple) * multiple
    return max(0, width - left) if left else 0


def _prove(block: FFNBlock) -> _Findings:
    down = NeuronWeight.of(block.down.linear, down=True)
    ups = [NeuronWeight.of(each.linear, down=False) for each in (block.up, block.gate) if each is not None]
    biases = [each.bias() for each in (block.up, block.gate) if each is not None]
    found = _Findings(set(down.zero(_candidates(down)).tolist()), {}, {})
    _constant_neurons(block, ups, biases, found)
    if block.onnx_type not in _HALF:
        _equal_neurons(block.d_ff, ups, biases, found)
    _relu_neurons(block, ups[-1], biases[-1], found)
    return found


def _candidates(weight: NeuronWeight) -> Indices:
    return np.flatnonzero(~weight.sample().any(axis=1))


def _constant_neurons(block: FFNBlock, ups: list[NeuronWeight], biases: list[Array | None], found: _Findings) -> None:
    still = [set(weight.zero(_candidates(weight)).tolist()) for weight in ups]
    if not any(still):
        return
    at = [np.zeros((1, block.d_ff)) if bias is None else bias.astype(np.float64).reshape(1, -1) for bias in biases]
    if block.gate is None:
        value = np.broadcast_to(block.hidden_from(at[0]), (1, block.d_ff))[0]
        both, nothing = still[0], np.zeros(block.d_ff, bool)
    else:
        value = np.broadcast_to(block.hidden_from(at[0], at[1]), (1, block.d_ff))[0]
        both = still[0] & still[1]
        one = np.broadcast_to(block.hidden_from(np.ones((1, block.d_ff)), at[1]), (1, block.d_ff))[0]
        nothing = np.zeros(block.d_ff, bool)
        nothing[[i for i in still[0] if at[0][0, i] == 0]] = True  # u = 0
        nothing[[i for i in still[1] if one[i] == 0]] = True  # act(g) = 0
    found.gone |= set(np.flatnonzero(nothing).tolist()) | {i for i in both if value[i] == 0}
    if block.down.linear.bias is not None and block.onnx_type not in _HALF:
        found.constant = {i: float(value[i]) for i in both - found.gone if np.isfinite(value[i])}


def _equal_neurons(width: int, ups: list[NeuronWeight], biases: list[Array | None], found: _Findings) -> None:
    numbers = [weight.sample() for weight in ups] + [bias.reshape(-1, 1) for bias in biases if bias is not None]
    keys: dict[bytes, list[int]] = {}
    for neuron in range(width):
        if neuron not in found.gone and neuron not in found.constant:
            keys.setdefault(b"".join(each[neuron].tobytes() for each in numbers), []).append(neuron)
    alike = np.asarray([neuron for group in keys.values() if len(group) > 1 for neuron in group], np.int64)
    if not len(alike):
        return
    alike.sort()
    hashes = list(zip(*(weight.digests(alike) for weight in ups), strict=True))
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for neuron, digests in zip(alike.tolist(), hashes, strict=True):
        bias = b"".join(each[neuron].tobytes() for each in biases if each is not None)
        groups.setdefault((*digests, bias), []).append(neuron)
    found.same = {group[0]: group[1:] for group in groups.values() if len(group) > 1}


def _relu_neurons(block: FFNBlock, weight: NeuronWeight, bias: Array | None, found: _Findings) -> None:
    """Neurons under a ReLU that the bound of the norm before the block proves always off, or all always on."""
    if block.activation.name not in ("relu", "relu2"):
        return
    x = (block.gate or block.up).linear.input
    node = producer(x)
    while node is not None and node.op in ("Identity", "Reshape"):
        node = producer(node.inputs[0])
    norm = read_norm(node) if node is not None else None
    if norm is None or norm.width != block.d_model or norm.scale.overridable or (norm.shift and norm.shift.overridable):
        return
    scale = np.broadcast_to(norm.scale.load().reshape(-1).astype(np.float64), (norm.width,))
    shift = None if norm.shift is None else norm.shift.load().reshape(-1).astype(np.float64)
    centre, radius = bound(weight, scale, shift, bias, norm.centred)
    found.gone |= set(np.flatnonzero(centre + radius <= 0).tolist())
    found.all_on = block.gate is None and block.activation.name == "relu" and bool((centre - radius >= 0).all())


def _without_relu(block: FFNBlock) -> int:
    relus = [node for node in block.region.nodes if node.op == "Relu" and not node.domain]
    if len(relus) != 1 or is_output(block.graph, relus[0].outputs[0]):
        return 0
    [relu] = relus
    replace_uses(relu.outputs[0], relu.inputs[0])
    relu.outputs[0].replaced_by = relu.inputs[0]
    remove_dead(block.graph, [relu])
    return 1


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
        numbers = fold(bias[0].inputs[bias[1]]).load().reshape(-1)[kept]  # type: ignore[union-attr]
        places.append((*bias, build.constant(numbers, "kept_bias")))
    for node, index, constant in places:
        old = producer(node.inputs[index])
        set_input(node, index, constant)
        remove_dead(graph, [old] if old is not None else [])


def _narrow(block: FFNBlock, width: int) -> None:
    """Forget what is known about the shapes of the values in between."""
    nodes = [*block.region.nodes, *(node for each in (block.up, block.gate) if each for node in each.linear.nodes)]
    for node in nodes:
        node.reshaped = True
        for tensor in node.outputs:
            if getattr(tensor, "shape", None):
                tensor.shape = [*tensor.shape[:-1], width]
