"""Attention sublayers: what mixes tokens on its way into the residual stream.

    x ──► q, k, v ──► Softmax(q kᵀ) ──► · v ──► [gate] ──► out ──► [bias, norm, scale] ──► Add ◄── residual

Found from the operator that mixes, by walking forwards: from a Softmax (also one written out as a quotient) into a product with a
computed value, or from a fused attention operator, through the output projection, to the Add (or SkipLayerNormalization) whose
other operand is on the stream that the mixing was computed from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
import onnx_graphsurgeon as gs

from .constant import fold, remembering
from .edit import consumers, current, is_output, producer
from .linear import MICROSOFT, Linear, read_linear
from .model import Model
from .rejection import Rejection
from .residual import SKIP_NORMS, Ancestors, Join, addends, follow, terms
from .sort import reads, topological

_STEPS = 2000
_MOST_LINEARS = 2  # behind the mixing: the output projection, which may be two thin matrices
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Einsum", "Gemm"})
_MEASURES = frozenset({"Shape", "Size"})


@dataclass(eq=False)
class Attention:
    """One attention sublayer.

    Attributes:
        name: of the node that joins it. path, graph: where it is.
        core: the node that mixes tokens.
        output: of its last linear, bias included.
        join: where it is first added to something; in parallel blocks the other operand may be the FFN and not the residual.
        stream: the node that adds it to the residual stream; residual: that stream before.
        axis: where the features are, counted from the end. onnx_type: element type of the output.
        crosses: the values that it mixes are not on its own stream (cross-attention).
    """

    name: str
    path: str
    graph: gs.Graph
    core: gs.Node
    output: gs.Tensor
    join: Join
    stream: gs.Node
    residual: gs.Tensor
    axis: int = -1
    onnx_type: int = onnx.TensorProto.FLOAT
    crosses: bool = False

    @property
    def fused_cache(self) -> bool:
        """Whether the node that mixes also computes a cache that is read."""
        return any(tensor.name and (tensor.outputs or is_output(self.graph, tensor)) for tensor in self.core.outputs[1:])

    @property
    def present(self) -> bool:
        """Whether it still joins the stream."""
        return any(node is self.join.node for node in self.graph.nodes)

    def settle(self) -> None:
        """Follow the values that other rewrites have replaced since it was found."""
        self.output, self.residual = current(self.output), current(self.residual)
        self.join.branch, self.join.residual = current(self.join.branch), current(self.join.residual)


@remembering()
def find_attention(model: Model) -> tuple[list[Attention], list[Rejection]]:
    """Every attention sublayer of ``model`` in order of execution, and what mixes tokens and joins no stream."""
    graphs = [(path, graph, topological(graph.nodes)) for path, graph in model.graphs()]
    positions: dict[int, int] = {}
    for _, _, nodes in reversed(graphs):
        for node in nodes:
            positions[id(node)] = len(positions)
    search = _Search(Ancestors(positions, ()))
    found: dict[int, Attention] = {}
    rejected: list[Rejection] = []
    for path, graph, nodes in graphs:
        for node in nodes:
            result = search.walk(node, path, graph) if _mixes(node) else None
            if isinstance(result, Rejection):
                rejected.append(result)
            elif result is not None:
                found.setdefault(id(result.join.node), result)
    return list(found.values()), rejected


def is_fused(node: gs.Node) -> bool:
    """Whether one operator does all of it: Attention, MultiHeadAttention, GroupQueryAttention and their like."""
    return node.op.endswith("Attention")


def _mixes(node: gs.Node) -> bool:
    if is_fused(node) or node.op == "Softmax":
        return True
    if node.op != "Div" or len(node.inputs) != 2:  # exp(s) / Σ exp(s)
        return False
    total, above = producer(node.inputs[1]), producer(node.inputs[0])
    return (total is not None and total.op == "ReduceSum" and total.inputs[0] is node.inputs[0]
            and above is not None and above.op == "Exp")


@dataclass(frozen=True)
class _At:
    """A place on the walk.

    Attributes:
        value: what was multiplied with the weights of the mixing; None before that.
        linears: passed since. first: the first Add of two computed values behind those.
    """

    tensor: gs.Tensor
    value: gs.Tensor | None
    linears: tuple[Linear, ...] = ()
    first: Join | None = None


class _Search:
    """The walk forwards."""

    def __init__(self, ancestors: Ancestors) -> None:
        self._ancestors = ancestors

    def walk(self, core: gs.Node, path: str, graph: gs.Graph) -> Attention | Rejection | None:
        """The sublayer that ``core`` mixes in; None where it is none (a router, a classifier)."""
        pending = [_At(core.outputs[0], _mixed_by(core) if is_fused(core) else None)]
        seen = {id(core.outputs[0])}
        here = {id(node) for node in graph.nodes}
        mixed = is_fused(core)
        for _ in range(_STEPS):
            if not pending:
                break
            at = pending.pop(0)
            for node in consumers(at.tensor):
                outcome = self._step(at, node, core)
                if isinstance(outcome, _Joined):
                    if id(node) in here:
                        return self._sublayer(core, path, graph, outcome, node)
                    continue
                for following in outcome:
                    mixed |= following.value is not None
                    if id(following.tensor) not in seen and following.tensor.name:
                        seen.add(id(following.tensor))
                        pending.append(following)
        return Rejection(core.outputs[0].name, "what it mixes is added to no residual stream") if mixed else None

    def _step(self, at: _At, node: gs.Node, core: gs.Node) -> list[_At] | _Joined:
        """Where the walk goes on behind ``node``, or that it has arrived."""
        if node.op in _MEASURES:
            return []
        linear = read_linear(node)
        if linear is not None and any(at.tensor is value for inner in linear.nodes for value in inner.inputs):
            further = at.value is not None and len(at.linears) < _MOST_LINEARS
            return [replace(at, tensor=linear.output, linears=(*at.linears, linear))] if further else []
        addition = self._addition(node, at.tensor, core)
        if at.value is None:
            if addition is not None:
                return []  # weights of experts, whose outputs join the stream
            computed = [each for each in node.inputs if each.name and fold(each) is None and each is not at.tensor]
            value = computed[0] if node.op in _PRODUCTS and computed else None
            return [replace(at, tensor=out, value=value) for out in node.outputs]
        if addition is not None:
            other, on_stream = addition
            first = at.first or Join(node, at.tensor, other, False, [])
            if on_stream:
                return _Joined(first, other, at)
            return [replace(at, tensor=out, first=first if at.linears else None) for out in node.outputs]
        onwards = follow(node, at.tensor) if at.linears else node.outputs
        return [replace(at, tensor=out) for out in onwards or []]

    def _addition(self, node: gs.Node, tensor: gs.Tensor, core: gs.Node) -> tuple[gs.Tensor, bool] | None:
        """The other operand of an Add of two computed values, and whether ``core`` was computed from it."""
        others = [value for value in addends(node) if value is not tensor and fold(value) is None
                  and not self._ancestors.leads([core.outputs[0]], value)]
        for other in others:
            if self._ancestors.leads(_stream(other), core.outputs[0]):
                return other, True
        return (others[0], False) if others else None

    def _sublayer(self, core: gs.Node, path: str, graph: gs.Graph, joined: _Joined, stream: gs.Node) -> Attention:
        join, residual, at = joined.first, joined.residual, joined.at
        assert at.value is not None
        last = at.linears[-1] if at.linears else None
        found = Attention(join.node.name or core.name or core.outputs[0].name, path, graph, core,
                          last.output if last is not None else join.branch, join, stream, residual)
        if last is not None:
            found.axis, found.onnx_type = last.axis, last.onnx_type
        elif isinstance(join.branch.dtype, int):
            found.onnx_type = join.branch.dtype
        found.crosses = not _holds(at.value, _stream(residual))
        return found


@dataclass(frozen=True)
class _Joined:
    """The end of the walk: the first Add of two computed values, and the residual of the stream."""

    first: Join
    residual: gs.Tensor
    at: _At


def _mixed_by(core: gs.Node) -> gs.Tensor:
    """The values that a fused operator mixes, or what it makes them from."""
    holds_weights = core.op == "Attention" and core.domain == MICROSOFT
    return core.inputs[2] if len(core.inputs) > 2 and core.inputs[2].name and not holds_weights else core.inputs[0]


def _stream(residual: gs.Tensor) -> list[gs.Tensor]:
    """The values on the stream that ``residual`` stands for: itself, its terms; where a node gives a sum and its norm, both."""
    return [each for term in terms(residual) for each in _siblings(term)]


def _siblings(tensor: gs.Tensor) -> list[gs.Tensor]:
    """The value, and where its node gives a sum and the norm of that sum, both."""
    node = producer(tensor)
    return [each for each in node.outputs if each.name] if node is not None and node.op in SKIP_NORMS else [tensor]


def _holds(value: gs.Tensor, starts: list[gs.Tensor]) -> bool:
    """Whether ``value`` is computed from numbers of any of ``starts``, and not from their dimensions alone."""
    wanted = {id(tensor) for tensor in starts}
    pending, seen = [value], {id(value)}
    while pending and len(seen) < _STEPS:
        tensor = pending.pop(0)
        if id(tensor) in wanted:
            return True
        node = producer(tensor)
        if node is None or node.op in _MEASURES:
            continue
        for source in reads(node):
            if id(source) not in seen and not isinstance(source, gs.Constant):
                seen.add(id(source))
                pending.append(source)
    return False
