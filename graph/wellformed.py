"""What must hold of a parsed model before anybody looks into its nodes: names are text, nodes have their inputs.

ONNX Runtime checks the same when it loads a model; a file that fails here is damaged, or not what it says it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import onnx

from .errors import InputError

_KIND = onnx.AttributeProto
_MICROSOFT = {"FusedMatMul": 2, "FusedGemm": 2, "FusedConv": 2, "MatMulNBits": 3, "DynamicQuantizeMatMul": 3,
              "MatMulIntegerToFloat": 4, "SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3, "Gelu": 1,
              "BiasGelu": 2, "FastGelu": 1, "QuickGelu": 1}
"""Inputs that operators of ONNX Runtime need (ContribOperators.md); the onnx package does not know them."""
_NEEDED = {"MatMulNBits": ("K", "N", "block_size")}


def check_nodes(model: onnx.ModelProto) -> None:
    """Check every node of ``model``, in its graphs and functions.

    Raises:
        InputError: a name is no text, or a node lacks inputs or outputs, or has an attribute of the wrong type.
    """
    opsets = _opsets(model.opset_import)
    _check_texts([model.producer_name, model.producer_version, *opsets])
    pending: list[tuple[Iterable[onnx.NodeProto], Mapping[str, int]]] = [(model.graph.node, opsets)]
    graphs = [model.graph]
    for function in model.functions:
        _check_texts([function.name, function.domain, *function.input, *function.output])
        pending.append((function.node, _opsets(function.opset_import)))
    while pending:
        nodes, known = pending.pop()
        for node in nodes:
            _check_texts(_texts(node))
            inside = _check_node(node, known)
            graphs += inside
            pending += [(graph.node, known) for graph in inside]
    for graph in graphs:
        _check_texts([graph.name, *(tensor.name for tensor in graph.initializer)])
        for info in (*graph.input, *graph.output, *graph.value_info):
            _check_texts([info.name, *(dim.dim_param for dim in info.type.tensor_type.shape.dim)])


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}


def _texts(node: onnx.NodeProto) -> Iterator[str]:
    yield from (node.op_type, node.name, node.domain)
    yield from node.input
    yield from node.output
    for attribute in node.attribute:
        yield attribute.name
        if attribute.type == _KIND.TENSOR:
            yield attribute.t.name


def _check_texts(names: Iterable[str]) -> None:
    for name in names:
        if not isinstance(name, str):  # what protobuf gives for bytes that are no UTF-8
            raise InputError(f"the name {bytes(name)[:40]!r} is no text: the file is damaged")


def _check_node(node: onnx.NodeProto, opsets: Mapping[str, int]) -> list[onnx.GraphProto]:
    """Check ``node``; returns the graphs in its attributes."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    inputs, outputs, types, needed = _signature(node.op_type, domain, opsets.get(domain, 1))
    title = f"node '{node.name}' ({node.op_type})" if node.name else f"a {node.op_type} without a name"
    if len(node.input) < inputs or len(node.output) < outputs:
        raise InputError(f"{title} has {len(node.input)} inputs and {len(node.output)} outputs, but needs at least "
                         f"{inputs} and {outputs}: export the model again")
    present = {attribute.name for attribute in node.attribute}
    for name in needed:
        if name not in present:
            raise InputError(f"{title} has no attribute '{name}', which it needs: export the model again")
    graphs = []
    for attribute in node.attribute:
        wanted = types.get(attribute.name)
        if wanted is not None and attribute.type != wanted and not attribute.ref_attr_name:
            raise InputError(f"{title}: its attribute '{attribute.name}' is no {_KIND.AttributeType.Name(wanted)}: "
                             "export the model again")
        graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    return graphs


@lru_cache(maxsize=4096)
def _signature(op: str, domain: str, version: int) -> tuple[int, int, Mapping[str, int], tuple[str, ...]]:
    """Least number of inputs and outputs, types of attributes, and attributes that must be there; what is known of it."""
    if domain == "com.microsoft":
        return _MICROSOFT.get(op, 0), 1 if op in _MICROSOFT else 0, {}, _NEEDED.get(op, ())
    try:
        schema = onnx.defs.get_schema(op, version, domain)
    except (onnx.defs.SchemaError, RuntimeError, TypeError):
        return 0, 0, {}, ()  # not of this operator set: ONNX Runtime has its own in the default domain too
    types = {name: int(attribute.type.value) for name, attribute in schema.attributes.items()}
    return schema.min_input, schema.min_output, types, tuple(name for name, each in schema.attributes.items() if each.required)
