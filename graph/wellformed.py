"""What must hold of a parsed model before anybody looks into its nodes: names are text, nodes have their inputs.

ONNX Runtime checks the same when it loads a model; a file that fails here is damaged, or not what it says it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

import onnx

from .errors import InputError

_KIND = onnx.AttributeProto
_ANY_NUMBER = 1 << 31
_LONGEST_NAME = 1 << 16  # characters
_NEWEST = 1000  # more than any operator set has
_MICROSOFT = {"FusedMatMul": 2, "FusedGemm": 2, "FusedConv": 2, "MatMulNBits": 3, "DynamicQuantizeMatMul": 3,
              "MatMulIntegerToFloat": 4, "SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3, "Gelu": 1,
              "BiasGelu": 2, "FastGelu": 1, "QuickGelu": 1, "QuantizeLinear": 2, "DequantizeLinear": 2, "GatherND": 2}
"""Inputs that operators of ONNX Runtime need (ContribOperators.md); the onnx package does not know them."""
_MICROSOFT_TYPES = {**dict.fromkeys(("alpha", "beta", "epsilon"), _KIND.FLOAT), "activation": _KIND.STRING,
                    **dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level", "axis", "transA", "transB", "transBatchA",
                                     "transBatchB", "stash_type", "group"), _KIND.INT),
                    **dict.fromkeys(("pads", "strides", "dilations", "kernel_shape"), _KIND.INTS)}
_NEEDED = {"MatMulNBits": ("K", "N", "block_size")}
_DEFAULT_DOMAIN = {"SimplifiedLayerNormalization": 2, "FusedConv": 2, "FusedGemm": 2}
"""Inputs that operators need which ONNX Runtime has in the default domain, and the onnx package has not."""


def check_nodes(model: onnx.ModelProto) -> None:
    """Check every node of ``model``, in its graphs and functions.

    Raises:
        InputError: a name is no text, or a node lacks inputs or outputs, or has an attribute of the wrong type.
    """
    opsets = _opsets(model.opset_import)
    _check_texts([model.producer_name, model.producer_version, *opsets])
    pending: list[tuple[Iterable[onnx.NodeProto], Mapping[str, int], bool]] = [(model.graph.node, opsets, False)]
    graphs = [model.graph]
    for function in model.functions:
        _check_texts([function.name, function.domain, *function.input, *function.output])
        pending.append((function.node, _opsets(function.opset_import), True))
    while pending:
        nodes, known, in_function = pending.pop()
        for node in nodes:
            _check_texts(_texts(node))
            inside = _check_node(node, known, in_function)
            graphs += inside
            pending += [(graph.node, known, in_function) for graph in inside]
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
        if len(name) > _LONGEST_NAME:
            raise InputError(f"the name '{name[:40]}…' has {len(name)} characters: the file is damaged")


def _check_node(node: onnx.NodeProto, opsets: Mapping[str, int], in_function: bool) -> list[onnx.GraphProto]:
    """Check ``node``; returns the graphs in its attributes."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    inputs, outputs, most, types, needed = _signature(node.op_type, domain, opsets.get(domain, 1))
    title = f"node '{node.name}' ({node.op_type})" if node.name else f"a {node.op_type} without a name"
    if len(node.input) < inputs or len(node.output) < outputs:
        raise InputError(f"{title} has {len(node.input)} inputs and {len(node.output)} outputs, but needs at least "
                         f"{inputs} and {outputs}: export the model again")
    if len(node.input) > most:
        raise InputError(f"{title} has {len(node.input)} inputs, but takes at most {most}: export the model again")
    present = {attribute.name for attribute in node.attribute}
    for name in needed:
        if name not in present:
            raise InputError(f"{title} has no attribute '{name}', which it needs: export the model again")
    graphs = []
    for attribute in node.attribute:
        wanted = types.get(attribute.name)
        if attribute.ref_attr_name and not in_function:
            raise InputError(f"{title}: its attribute '{attribute.name}' is that of a function, but it lies in none: "
                             "export the model again")
        if wanted is not None and attribute.type != wanted and not attribute.ref_attr_name:
            raise InputError(f"{title}: its attribute '{attribute.name}' is no {_KIND.AttributeType.Name(wanted)}: "
                             "export the model again")
        graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    return graphs


@lru_cache(maxsize=4096)
def _signature(op: str, domain: str, version: int) -> tuple[int, int, int, Mapping[str, int], tuple[str, ...]]:
    """What is known of an operator: least inputs and outputs, most inputs, types of attributes, attributes that it needs."""
    if domain == "com.microsoft":
        return _MICROSOFT.get(op, 0), 1 if op in _MICROSOFT else 0, _ANY_NUMBER, _MICROSOFT_TYPES, _NEEDED.get(op, ())
    schema = _schema(op, version, domain) or _schema(op, _NEWEST, domain)
    if schema is None:  # ONNX Runtime has operators of its own in the default domain
        inputs = 0 if domain else _DEFAULT_DOMAIN.get(op, 0)
        return inputs, 1 if inputs else 0, _ANY_NUMBER, {} if domain else _MICROSOFT_TYPES, ()
    types = {name: int(attribute.type.value) for name, attribute in schema.attributes.items()}
    required = tuple(name for name, each in schema.attributes.items() if each.required)
    return schema.min_input, schema.min_output, schema.max_input, types, required


def _schema(op: str, version: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op, min(max(version, 1), _NEWEST), domain)
    except (onnx.defs.SchemaError, RuntimeError, TypeError):
        return None
