"""What can be proved of the neurons of a block: which do nothing, give a constant, or do what another does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ...graph.block import FFNBlock
from ...graph.edit import producer
from ...graph.norm import read_norm
from .neuron_range import Range, follow
from .neuron_weights import Indices, NeuronWeight, bound

Array = npt.NDArray[Any]
_WIDE = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@dataclass
class Proof:
    """What was proved of the neurons of a block.

    Attributes:
        gone: neurons that contribute nothing.
        constant: neurons that give ``constant[i]`` whatever goes in.
        same: neuron → others that equal it.
        ranges: what each value of the block can be, by identity.
    """

    gone: set[int]
    constant: dict[int, float]
    same: dict[int, list[int]]
    ranges: dict[int, Range]


def prove(block: FFNBlock) -> Proof:
    """What is true of the neurons of ``block`` whatever goes in. Constants and equals only where sums keep 32 bits."""
    down = NeuronWeight.of(block.down.linear, down=True)
    ups = [NeuronWeight.of(leaf.linear, down=False) for leaf in block.region.leaves]
    samples = [weight.sample() for weight in ups]
    biases = [None if leaf.linear.bias is None else leaf.linear.bias() for leaf in block.region.leaves]
    limits = _limits(block)
    starts = [_start(weight, _zeros(weight, sample), bias, limits)
              for weight, sample, bias in zip(ups, samples, biases, strict=True)]
    ranges = follow(block.region, starts)
    hidden = ranges[id(block.region.output)]
    found = Proof(set(_zeros(down, down.sample()).tolist()) | set(np.flatnonzero(hidden.zero).tolist()), {}, {}, ranges)
    if block.onnx_type in _WIDE:
        if block.down.linear.bias is not None:
            found.constant = {int(i): float(hidden.low[i]) for i in np.flatnonzero(hidden.known) if int(i) not in found.gone}
        left = np.setdiff1d(np.arange(block.d_ff), [*found.gone, *found.constant])
        found.same = _equal(left, ups, samples, [bias for bias in biases if bias is not None])
    _keep_unbounded(found, [down, *ups], [bias for bias in biases if bias is not None])
    return found


def _keep_unbounded(found: Proof, weights: list[NeuronWeight], biases: list[Array]) -> None:
    """Take back what was proved of neurons that hold an infinity or NaN, which a zero does not silence: 0 · ∞ is NaN."""
    proved = np.asarray(sorted(found.gone | set(found.constant)), np.int64)
    sound = proved
    for weight in weights:
        sound = weight.finite(sound)
    for bias in biases:
        sound = sound[np.isfinite(bias[sound].astype(np.float64))]
    for neuron in set(proved.tolist()) - set(sound.tolist()):
        found.gone.discard(neuron)
        found.constant.pop(neuron, None)


@dataclass(frozen=True)
class _Limits:
    """What the norm before a block lets through: ``x = x̂ ∘ scale + shift`` with ``‖x̂‖₂ ≤ √d``."""

    scale: Array
    shift: Array | None


def _limits(block: FFNBlock) -> _Limits | None:
    """The norm that the block reads, where the activation could make use of its bound."""
    fused = any(leaf.linear.fused_activation is not None for leaf in block.region.leaves)
    if not fused and not any(node.op in ("Relu", "Clip", "Max") for node in block.region.steps):
        return None
    node = producer(block.region.leaves[0].linear.input)
    while node is not None and node.op in ("Identity", "Reshape"):
        node = producer(node.inputs[0])
    norm = read_norm(node) if node is not None else None
    if norm is None or norm.width != block.d_model or norm.scale.overridable or (norm.shift and norm.shift.overridable):
        return None
    if any(leaf.linear.input is not block.region.leaves[0].linear.input for leaf in block.region.leaves):
        return None
    scale = np.broadcast_to(norm.scale.load().reshape(-1).astype(np.float64), (norm.width,))
    return _Limits(scale, None if norm.shift is None else norm.shift.load().reshape(-1).astype(np.float64))


def _start(weight: NeuronWeight, zeros: Indices, bias: Array | None, limits: _Limits | None) -> Range:
    """What a projection can give: its bias where its weights are zero, what the norm lets through elsewhere."""
    offset = np.zeros(weight.count) if bias is None else bias.astype(np.float64)
    low, high = np.full(weight.count, -np.inf), np.full(weight.count, np.inf)
    if limits is not None:
        centre, radius = bound(weight, limits.scale, limits.shift, bias)
        low, high = centre - radius, centre + radius
    low[zeros] = high[zeros] = offset[zeros]
    return Range(low, high)


def _zeros(weight: NeuronWeight, sample: Array) -> Indices:
    return weight.zero(np.flatnonzero(~sample.any(axis=1)))


def _equal(neurons: Indices, weights: list[NeuronWeight], samples: list[Array], biases: list[Array]) -> dict[int, list[int]]:
    """Those of ``neurons`` whose weights and biases equal those of an earlier one, bit for bit."""
    if not len(neurons):
        return {}
    rows = [np.ascontiguousarray(each[neurons]).view(np.uint8).reshape(len(neurons), -1)
            for each in (*samples, *(bias.reshape(-1, 1) for bias in biases))]
    numbers = np.concatenate(rows, axis=1)
    _, group, count = np.unique(numbers.view(f"V{numbers.shape[1]}").reshape(-1), return_inverse=True, return_counts=True)
    alike = neurons[count[group] > 1]
    if not len(alike):
        return {}
    hashes = list(zip(*(weight.digests(alike) for weight in weights), strict=True))
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for neuron, digests in zip(alike.tolist(), hashes, strict=True):
        groups.setdefault((*digests, *(bias[neuron].tobytes() for bias in biases)), []).append(neuron)
    return {equal[0]: equal[1:] for equal in groups.values() if len(equal) > 1}
