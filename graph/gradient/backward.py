"""Reverse mode: from what reaches the ends of a graph to what reaches its weights.

    ∂L/∂w = Σ over the nodes that read w of  (∂node/∂w)ᵀ ∂L/∂output

Only what lies between the weights asked for and the ends is gone through. Where a node there has no rule (an operator of another
domain, a subgraph, an attribute that no rule covers), what it reads is an end itself, and nothing behind it counts.

Source: reverse accumulation, Griewank and Walther, Evaluating Derivatives (2008), chapter 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from ..model import Model
from ..sort import reads, topological
from . import elementwise, norms, products, shapes
from .tape import Gradients, NoDerivativeError, Rule, Tape

OLDEST = 13
"""The first opset whose operators the rules are written in."""
_RULES: dict[str, Rule] = {**elementwise.RULES, **products.RULES, **shapes.RULES, **norms.RULES}
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_NO_SLOPE = frozenset((
    "Shape", "Size", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "ArgMax", "ArgMin",
    "IsNaN", "IsInf", "NonZero", "Sign", "Floor", "Ceil", "Round"))  # whose outputs are no smooth function of what they read


@dataclass(frozen=True)
class Path:
    """What lies between weights and ends.

    Attributes:
        ends: names of the values where the ways from the weights end: outputs of the graph, and what nodes without a rule read.
        blocked: operators of those nodes.
    """

    ends: tuple[str, ...]
    blocked: tuple[str, ...]


def path_from(model: Model, weights: Sequence[str], without: frozenset[str] = frozenset()) -> Path:
    """The ends that can be reached from the initializers called ``weights`` in the main graph.

    Args:
        without: names of outputs of nodes that are not gone through, though their operator has a rule.
    """
    live = _live(model, weights, without)
    outputs = {tensor.name for tensor in model.graph.outputs}
    ends: dict[str, None] = {}
    blocked: dict[str, None] = {}
    for node in topological(model.graph.nodes):
        if not _reads(node, live):
            continue
        if not _has_rule(node, without):
            blocked[node.op] = None
            ends |= {tensor.name: None for tensor in reads(node) if id(tensor) in live and not isinstance(tensor, gs.Constant)}
        ends |= {tensor.name: None for tensor in node.outputs if tensor.name in outputs and id(tensor) in live}
    return Path(tuple(ends), tuple(blocked))


def add_gradients(model: Model, seeds: Mapping[str, gs.Tensor], weights: Sequence[str],
                  without: frozenset[str] = frozenset()) -> dict[str, str]:
    """Add to the main graph the nodes that compute ∂L/∂w for each of ``weights``.

    Args:
        model: of opset 13 or later, float32 between the weights and the ends.
        seeds: name of an end → ∂L/∂end, in its shape.
        weights: names of initializers.
        without: as :func:`path_from` had it.

    Returns:
        Name of a weight → name of the value that is its gradient, in its shape; without those that no seed reaches.

    Raises:
        NoDerivativeError: a rule does not cover a node of its operator; its argument is the name of the node's first output.
    """
    live, order = _live(model, weights, without), topological(model.graph.nodes)
    tape = Tape(model)
    parts: dict[int, list[gs.Tensor]] = {}
    named = {tensor.name: tensor for node in order for tensor in (*node.inputs, *node.outputs) if id(tensor) in live}
    for name, seed in seeds.items():
        parts.setdefault(id(named[name]), []).append(seed)
    for node in reversed(order):
        reached: Gradients = [_sum(tape, parts.get(id(tensor), [])) for tensor in node.outputs]
        if not _reads(node, live) or not _has_rule(node, without):
            continue
        if reached[0] is None and not (node.op in shapes.MANY and any(each is not None for each in reached)):
            continue
        wanted = [id(tensor) in live for tensor in node.inputs]
        try:
            gradients = _RULES[node.op](tape, node, reached, wanted)
        except NoDerivativeError:
            raise NoDerivativeError(node.outputs[0].name) from None
        for tensor, gradient in zip(node.inputs, gradients, strict=True):
            if gradient is not None and id(tensor) in live:
                parts.setdefault(id(tensor), []).append(gradient)
    asked = set(weights)
    found = {name: _sum(tape, parts.get(id(tensor), [])) for name, tensor in named.items() if name in asked}
    return {name: each.name for name, each in found.items() if each is not None}


def _live(model: Model, weights: Sequence[str], without: frozenset[str]) -> set[int]:
    """Identities of the values that depend on ``weights`` by nodes that have rules, the weights included."""
    asked = set(weights)
    live = {id(tensor) for node in model.graph.nodes for tensor in node.inputs
            if isinstance(tensor, gs.Constant) and tensor.name in asked}
    for node in topological(model.graph.nodes):
        if _reads(node, live) and _has_rule(node, without):
            live |= {id(tensor) for tensor in (node.outputs if node.op in shapes.MANY else node.outputs[:1]) if tensor.name}
    return live


def _reads(node: gs.Node, live: set[int]) -> bool:
    """Whether ``node`` is a smooth function of something live."""
    stops = node.op in _NO_SLOPE or (node.op == "Cast" and node.attrs["to"] not in _FLOATS)
    return not stops and any(id(tensor) in live for tensor in reads(node))


def _has_rule(node: gs.Node, without: frozenset[str]) -> bool:
    plain = node.op in _RULES and node.domain in (None, "", "ai.onnx") and node.outputs[0].name not in without
    return plain and not (node.op == "Cast" and node.attrs["to"] != onnx.TensorProto.FLOAT)


def _sum(tape: Tape, parts: list[gs.Tensor]) -> gs.Tensor | None:
    """The sum of ``parts``, which it takes the place of."""
    if len(parts) > 1:
        parts[:] = [tape.op("Sum", *parts)]
    return parts[0] if parts else None
