"""The editing view: a ``gs.Graph`` over a weight-free ``GraphProto``, in which every node remembers where it came from.

onnx-graphsurgeon's own importer loses what is not in its model (initializers that are also inputs, metadata, optional
types), so its objects are built here and the proto stays the truth: each ``gs.Node`` carries an :class:`Origin`, and
``export.py`` writes a node that no pass touched back from its origin byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from .scope import free_names
from .weights import Values, values_of

Signature = tuple[Any, ...]
_OF_BOTH = frozenset({"Attention", "DequantizeLinear", "GatherND", "Gelu", "GridSample", "Pad", "QuantizeLinear", "Range",
                      "RotaryEmbedding", "SwiGLU", "Trilu", "Unique"})
"""Operators that ONNX Runtime has beside the standard ones of the same name (ContribOperators.md)."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node came from: its proto, and what the view held for it when it was imported."""

    proto: onnx.NodeProto
    signature: Signature


@dataclass(frozen=True, slots=True)
class Opaque:
    """An attribute that the view does not look into (types, sparse tensors, lists of graphs, references)."""

    proto: onnx.AttributeProto


def signature(node: gs.Node) -> Signature:
    """What tells an edited node from an untouched one: operator, names of values, attributes by identity."""
    attributes = tuple((key, tuple(value) if isinstance(value, list) else _identity(value))
                       for key, value in node.attrs.items())
    return (node.op, node.domain, node.name, tuple(t.name for t in node.inputs), tuple(t.name for t in node.outputs),
            attributes)


def _operator(proto: onnx.NodeProto) -> str:
    """What the view calls the operator of a node: ``DOMAIN::NAME`` where another set has one of a standard operator's name.

    So nothing that looks for a Reshape, say, takes somebody else's Reshape, of which nothing is known, for one.
    """
    domain, name = proto.domain, proto.op_type
    if domain in ("", "ai.onnx") or not onnx.defs.has(name) or (domain == "com.microsoft" and name in _OF_BOTH):
        return name
    return f"{domain}::{name}"


def operator_name(node: gs.Node) -> str:
    """The ``op_type`` of a node of the view."""
    name: str = node.op
    return name.removeprefix(f"{node.domain}::") if node.domain else name


def _identity(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bytes)) else id(value)


class Importer:
    """Builds the view of a graph and of the graphs inside it (If, Loop, Scan bodies).

    Args:
        values: what the stubs in the proto stand for (``Stored.values``).
    """

    def __init__(self, values: Mapping[str, Values], opset: int) -> None:
        self._values = values
        self._opset = opset

    def graph(self, proto: onnx.GraphProto, outer: Mapping[str, gs.Tensor] | None = None) -> gs.Graph:
        """The view of ``proto``. Values of the graphs around it (``outer``) are the same objects inside."""
        scope: dict[str, gs.Tensor] = {}
        given = {value.name for value in proto.input}
        constants = []
        for tensor in proto.initializer:
            if tensor.name not in given:  # an initializer that is also an input can be overridden: no constant
                scope[tensor.name] = gs.Constant(tensor.name, values_of(tensor, self._values))
                constants.append(scope[tensor.name])
        produced = {name for node in proto.node for name in node.output if name}
        for info in proto.value_info:
            if info.name in produced or info.name in given:  # it may also speak of values of the graphs around
                scope.setdefault(info.name, _variable(info))
        inputs = [scope.setdefault(info.name, _variable(info)) for info in proto.input]
        for tensor in proto.initializer:
            if tensor.name in given:
                scope[tensor.name].default = values_of(tensor, self._values)
        for info in proto.output:
            if info.name in produced or outer is None or info.name not in outer:
                scope.setdefault(info.name, _variable(info))
        for name in produced:
            scope.setdefault(name, gs.Variable(name))
        resolve = _Resolver(scope, outer or {})
        outputs = [resolve(info.name) for info in proto.output]
        for output in outputs:
            if outer is not None and output.name in outer and outer[output.name] is output:
                output.captured = True  # known to this graph by its name alone: it must stay
        nodes = [self._node(node, resolve) for node in proto.node]
        view = gs.Graph(nodes=nodes, inputs=inputs, outputs=outputs, name=proto.name, opset=self._opset)
        view.origin = proto
        view.constants = constants
        view.swept = False  # whether it is written without the initializers that nothing reads
        for constant in constants:
            constant.home = view  # the graph whose initializer it is
            constant.was_used = bool(constant.outputs)
        return view

    def _node(self, proto: onnx.NodeProto, resolve: _Resolver) -> gs.Node:
        attrs = {attribute.name: self._attribute(attribute, resolve) for attribute in proto.attribute}
        node = gs.Node(op=_operator(proto), name=proto.name, attrs=attrs, domain=proto.domain or None,
                       inputs=[resolve(name) for name in proto.input],
                       outputs=[resolve(name) for name in proto.output])
        node.origin = Origin(proto, signature(node))
        return node

    def _attribute(self, proto: onnx.AttributeProto, resolve: _Resolver) -> Any:
        kind = onnx.AttributeProto
        if proto.ref_attr_name:
            return Opaque(proto)
        if proto.type == kind.FLOAT:
            return proto.f
        if proto.type == kind.INT:
            return proto.i
        if proto.type == kind.STRING:
            return proto.s.decode("utf-8", "surrogateescape")
        if proto.type == kind.FLOATS:
            return list(proto.floats)
        if proto.type == kind.INTS:
            return list(proto.ints)
        if proto.type == kind.STRINGS:
            return [text.decode("utf-8", "surrogateescape") for text in proto.strings]
        if proto.type == kind.TENSOR:
            return gs.Constant(proto.t.name, values_of(proto.t, self._values))
        if proto.type == kind.GRAPH:
            return self.graph(proto.g, {**resolve.outer, **resolve.scope})
        for name in {name for graph in proto.graphs for name in free_names(graph)}:
            resolve(name).captured = True
        return Opaque(proto)


class _Resolver:
    """Finds the value a name means: in this graph first, then in the graphs around it."""

    def __init__(self, scope: dict[str, gs.Tensor], outer: Mapping[str, gs.Tensor]) -> None:
        self.scope = scope
        self.outer = outer

    def __call__(self, name: str) -> gs.Tensor:
        if not name:
            return gs.Variable.empty()
        found = self.scope.get(name)
        if found is None:
            found = self.outer.get(name)
        if found is None:
            found = self.scope[name] = gs.Variable(name)
        return found


def _variable(info: onnx.ValueInfoProto) -> gs.Variable:
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        return gs.Variable(info.name, type=info.type.WhichOneof("value"))
    shape = None
    if tensor.HasField("shape"):
        shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
    # the ONNX type number, not a NumPy type: NumPy lacks half of them
    return gs.Variable(info.name, dtype=tensor.elem_type or None, shape=shape)
