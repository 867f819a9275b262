"""Whether ONNX Runtime loads a model, asked without its weights."""

from __future__ import annotations

import onnx

from ..graph.model import Model
from ..graph.weights import stub_key
from .onnx_runtime import MISSING_KERNEL, onnx_runtime


def load_complaint(model: Model) -> str | None:
    """What ONNX Runtime says against ``model`` on loading, in one line; None where it loads.

    Weights become inputs (in subgraphs and Constant nodes: ConstantOfShape), so that types, shapes and kernels are
    checked at the cost of the graph alone. Only where that fails is the whole model loaded, and what that says counts.
    """
    if _loads(_weight_free(model)):
        return None
    from .sessions import open_session

    try:
        open_session(model, optimize=False)
    except Exception as error:
        return str(error).strip().splitlines()[0][:400]
    return None


def is_missing_kernel(complaint: str) -> bool:
    """Whether ``complaint`` is about nothing but an operator that this provider has no kernel for in its types."""
    return MISSING_KERNEL in complaint


def _loads(data: bytes) -> bool:
    onnxruntime = onnx_runtime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def _weight_free(model: Model) -> bytes:
    proto, _ = model.to_proto()
    free = onnx.ModelProto()
    free.CopyFrom(proto)
    given = {info.name for info in free.graph.input}
    for tensor in free.graph.initializer:
        if stub_key(tensor) is not None and tensor.name not in given:
            free.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    _empty(free.graph, [])
    return free.SerializeToString()


def _empty(graph: onnx.GraphProto, zeros: list[onnx.NodeProto]) -> None:
    """Take the weights out of ``graph``; ``zeros`` are nodes to put in front of it."""
    kept = [tensor for tensor in graph.initializer if stub_key(tensor) is None]
    nodes = list(zeros)
    for node in graph.node:
        stub = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t") and stub_key(a.t)), None)
        if node.op_type == "Constant" and stub is not None:
            nodes += _zeros(node.output[0], stub)
            continue
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _empty(inner, [zero for tensor in inner.initializer if stub_key(tensor) is not None
                               for zero in _zeros(tensor.name, tensor)])
        nodes.append(node)
    tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.initializer[:]
    del graph.node[:]
    graph.initializer.extend(tensors)
    graph.node.extend(copies)


def _zeros(name: str, tensor: onnx.TensorProto) -> list[onnx.NodeProto]:
    """Nodes that make zeros of the type and shape of ``tensor``."""
    shape = onnx.helper.make_tensor("", onnx.TensorProto.INT64, [len(tensor.dims)], tensor.dims)
    zero = onnx.helper.make_tensor("", tensor.data_type, [1], [0])
    return [onnx.helper.make_node("Constant", [], [f"{name}/shape"], value=shape),
            onnx.helper.make_node("ConstantOfShape", [f"{name}/shape"], [name], value=zero)]
