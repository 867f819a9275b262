"""The graph of a float32 model as one of 16 bits, by ONNX Runtime's converter. Weights are stubs all the while."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from ...graph.check import sort_nodes
from ...graph.tensors import tensors
from ...graph.weights import Values, tensor_proto, values_of
from .half_weights import half_values

_FLOAT, _FLOAT16, _BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
_MARK = "ffnfold:"
_NO_KERNEL = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM", "QAttention", "QEmbedLayerNormalization",
              "QLinearAdd", "QLinearMul", "QGemm", "QLinearSoftmax", "QLinearSigmoid", "QOrderedMatMul"}
_NAMES = {_FLOAT16: "tensor(float16)", _BFLOAT16: "tensor(bfloat16)"}


@dataclass(frozen=True)
class HalfGraph:
    """A converted model.

    Attributes:
        proto: the model, weights as stubs.
        values: what its new stubs stand for.
        converted: the float32 weights that are in 16 bits now.
    """

    proto: onnx.ModelProto
    values: Mapping[str, Values]
    converted: list[Values]


def convert(model: onnx.ModelProto, values: Mapping[str, Values], onnx_type: int, operators: Collection[str],
            nodes: Collection[str]) -> HalfGraph | str:
    """``model`` with inputs and outputs as they are and everything else in ``onnx_type`` that can be, or why it cannot be done.

    Args:
        model: weights as stubs; values: what they stand for.
        onnx_type: FLOAT16 or BFLOAT16.
        operators: operators that stay in float32.
        nodes: nodes that stay in float32, by their name or by a value that they compute.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    if proto.functions:
        importlib.import_module("onnx.inliner")
        proto = onnx.inliner.inline_local_functions(proto)
    known = {info.name for graph in _graphs(proto.graph) for info in graph.value_info}
    _tell_constants_apart(proto)
    _write_constants_as_tensors(proto)
    named = _name_nodes(proto, nodes)
    _infer_types(proto)
    parked = _park(proto)
    converter = importlib.import_module("onnxruntime.transformers.float16")
    blocked = {*converter.DEFAULT_OP_BLOCK_LIST, *_NO_KERNEL, *operators, *_without_half(proto, onnx_type)}
    try:
        proto = converter.convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True,
                                                   op_block_list=sorted(blocked), node_block_list=list(named))
    except (AssertionError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        return f"ONNX Runtime's converter fails on it ({' '.join(str(error).split())[:200] or type(error).__name__})"
    _drop_repeated_casts(proto.graph)
    _join_float(proto.graph)
    sort_nodes(proto.graph)
    if onnx_type == _BFLOAT16:
        _as_bfloat16(proto)
    new, converted = _unpark(proto, parked, values, onnx_type)
    for whole, edges in ((proto.graph.input, model.graph.input), (proto.graph.output, model.graph.output)):
        del whole[:]
        whole.extend(edges)
    for graph in _graphs(proto.graph):
        kept = [info for info in graph.value_info if info.name in known]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        for node in graph.node:
            node.name = named.get(node.name, node.name)
    return HalfGraph(proto, new, converted)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _tell_constants_apart(proto: onnx.ModelProto) -> None:
    """Initializers of graphs inside get names of their own: the converter tells them apart by name."""
    taken: set[str] = set()
    for graph in _graphs(proto.graph):
        for tensor in graph.initializer:
            if tensor.name not in taken:
                taken.add(tensor.name)
                continue
            old, number = tensor.name, 2
            while f"{old}_{number}" in taken:
                number += 1
            tensor.name = f"{old}_{number}"
            taken.add(tensor.name)
            for inner in _graphs(graph):
                if inner is graph or all(each.name != old for each in inner.initializer):
                    for node in inner.node:
                        node.input[:] = [tensor.name if name == old else name for name in node.input]


def _write_constants_as_tensors(proto: onnx.ModelProto) -> None:
    """Constant nodes hold a tensor, also where they held a number: the converter looks at tensors only."""
    for graph in _graphs(proto.graph):
        for node in graph.node:
            if node.op_type != "Constant":
                continue
            for attribute in list(node.attribute):
                if attribute.name in ("value_float", "value_floats"):
                    numbers = [attribute.f] if attribute.name == "value_float" else list(attribute.floats)
                    dims = [] if attribute.name == "value_float" else [len(numbers)]
                    node.attribute.remove(attribute)
                    node.attribute.append(onnx.helper.make_attribute("value", onnx.helper.make_tensor("", _FLOAT, dims, numbers)))


def _name_nodes(proto: onnx.ModelProto, wanted: Collection[str]) -> dict[str, str]:
    """Unique names for the nodes ``wanted``: name → the one they had."""
    found: dict[str, str] = {}
    for graph in _graphs(proto.graph):
        for node in graph.node:
            if (node.name and node.name in wanted) or any(name in wanted for name in node.output):
                unique = f"{_MARK}{len(found)}"
                found[unique], node.name = node.name, unique
    return found


def _infer_types(proto: onnx.ModelProto) -> None:
    """Element types of all values: what onnx knows; behind operators that it does not know, by the types of their inputs."""
    sort_nodes(proto.graph)
    with contextlib.suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        proto.CopyFrom(onnx.shape_inference.infer_shapes(proto))
    kinds: dict[str, int] = {}
    for graph in _graphs(proto.graph):
        for info in (*graph.input, *graph.output, *graph.value_info):
            kinds[info.name] = info.type.tensor_type.elem_type
        kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        for node in graph.node:
            for name, kind in _output_types(proto, node, kinds):
                kinds[name] = kind
                graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, None))


def _output_types(proto: onnx.ModelProto, node: onnx.NodeProto, kinds: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The outputs whose type was not known, and what it is, as far as it follows from the inputs."""
    if all(not name or kinds.get(name) for name in node.output):
        return
    schema = _schema(proto, node)
    if schema is None:
        kind = next((kinds[name] for name in node.input if kinds.get(name) in (_FLOAT, _FLOAT16)), 0)
        if kind and node.output[0] and not kinds.get(node.output[0]):
            yield node.output[0], kind
        return
    bound = {_formal(schema.inputs, place).type_str: kinds.get(name, 0) for place, name in enumerate(node.input) if name}
    to = next((attribute.i for attribute in node.attribute if attribute.name in ("to", "dtype")), 0)
    for place, name in enumerate(node.output):
        kind = bound.get(_formal(schema.outputs, place).type_str, 0) or (to if place == 0 else 0)
        if name and kind and not kinds.get(name):
            yield name, kind


def _schema(proto: onnx.ModelProto, node: onnx.NodeProto) -> onnx.defs.OpSchema | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = next((entry.version for entry in proto.opset_import if entry.domain.replace("ai.onnx", "") == domain), 1)
    try:
        return onnx.defs.get_schema(node.op_type, version, domain)
    except onnx.defs.SchemaError:
        return None


def _formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], place: int) -> onnx.defs.OpSchema.FormalParameter:
    """The parameter at ``place``; the last one may stand for many."""
    return formals[min(place, len(formals) - 1)]


def _without_half(proto: onnx.ModelProto, onnx_type: int) -> set[str]:
    """Operators of the model that take or give float32 and not ``onnx_type`` in its opset."""
    found = set()
    for graph in _graphs(proto.graph):
        for node in graph.node:
            schema = _schema(proto, node)
            if schema is None or node.op_type in found:
                continue
            allowed = {each.type_param_str: set(each.allowed_type_strs) for each in schema.type_constraints}
            used = [_formal(schema.inputs, place) for place, name in enumerate(node.input) if name]
            used += [_formal(schema.outputs, place) for place, name in enumerate(node.output) if name]
            groups = (allowed.get(each.type_str, {each.type_str}) for each in used)
            if any("tensor(float)" in group and _NAMES[onnx_type] not in group for group in groups):
                found.add(node.op_type)
    return found


def _park(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Take the numbers of the float32 tensors out, and mark each with its place in the list that is returned."""
    parked = []
    for tensor, _ in tensors(proto):
        if tensor.data_type != _FLOAT:
            continue
        held = onnx.TensorProto()
        held.CopyFrom(tensor)
        parked.append(held)
        name = tensor.name
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.doc_string = name, _FLOAT, f"{_MARK}{len(parked) - 1}"
        tensor.dims.append(0)
    return parked


def _unpark(proto: onnx.ModelProto, parked: list[onnx.TensorProto], values: Mapping[str, Values],
            onnx_type: int) -> tuple[dict[str, Values], list[Values]]:
    new: dict[str, Values] = {}
    converted: list[Values] = []
    made: dict[str, Values] = {}
    for tensor, _ in tensors(proto):
        if not tensor.doc_string.startswith(_MARK):
            continue
        held, name, kind = parked[int(tensor.doc_string.removeprefix(_MARK))], tensor.name, tensor.data_type
        if kind == _FLOAT:
            tensor.CopyFrom(held)
            tensor.name = name
            continue
        whole = values_of(held, values)
        if whole.key not in made:
            made[whole.key] = half_values(whole, onnx_type)
            converted.append(whole)
        stored, key = tensor_proto(name, made[whole.key])
        tensor.CopyFrom(stored)
        if held.doc_string:
            tensor.doc_string = held.doc_string
        if key is not None:
            new[key] = made[whole.key]
    return new, converted


def _drop_repeated_casts(graph: onnx.GraphProto) -> None:
    """ONNX Runtime 1.30's converter can write one Cast for each reader of a value, all of one name."""
    first: dict[tuple[str, str], str] = {}
    same: dict[str, str] = {}
    kept = []
    for node in graph.node:
        key = (node.name, node.input[0]) if node.op_type == "Cast" else ("", "")
        if key[0].endswith(("_cast_to_fp32_node", "_cast_to_fp16_node")):
            if key in first:
                same[node.output[0]] = first[key]
                continue
            first[key] = node.output[0]
        kept.append(node)
    if not same:
        return
    del graph.node[:]
    graph.node.extend(kept)
    for inner in _graphs(graph):
        for node in inner.node:
            node.input[:] = [same.get(name, name) for name in node.input]


def _join_float(graph: onnx.GraphProto) -> None:
    """Between two nodes that stay in float32 the converter casts to 16 bits and back: let the second read the first."""
    narrowed = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith("_cast_to_fp16_node")}
    widened = {node.output[0]: narrowed[node.input[0]] for node in graph.node
               if node.name.endswith("_cast_to_fp32_node") and node.input[0] in narrowed}
    for inner in _graphs(graph):
        for node in inner.node:
            node.input[:] = [widened.get(name, name) for name in node.input]
    kept = [node for node in graph.node if not (node.output and node.output[0] in widened)]
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for inner in _graphs(graph) for node in inner.node for name in node.input}
    read |= {info.name for inner in _graphs(graph) for info in inner.output}
    kept = [node for node in graph.node if not (node.output and node.output[0] in narrowed and node.output[0] not in read)]
    del graph.node[:]
    graph.node.extend(kept)


def _as_bfloat16(proto: onnx.ModelProto) -> None:
    """The other type wherever the converter put float16. There was none before."""
    for graph in _graphs(proto.graph):
        for info in (*graph.input, *graph.output, *graph.value_info):
            for kind in (info.type.tensor_type, info.type.sequence_type.elem_type.tensor_type):
                if kind.elem_type == _FLOAT16:
                    kind.elem_type = _BFLOAT16
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in ("to", "dtype") and attribute.i == _FLOAT16:
                    attribute.i = _BFLOAT16
    for tensor, _ in tensors(proto):
        if tensor.data_type == _FLOAT16:
            tensor.data_type = _BFLOAT16
