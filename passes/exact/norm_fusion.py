"""Whether ONNX Runtime makes one operator of a norm that is written out: asked, not guessed."""

from __future__ import annotations

from typing import Any

import onnx

from ...graph.constant import fold
from ...graph.errors import InputError
from ...graph.model import Model
from ...graph.norm import Norm
from ...graph.sort import topological
from ...runtime.executed import executed_ops
from ..base import Context

_FUSED = ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization")


def is_fused(model: Model, norm: Norm, context: Context) -> bool:
    """Whether ONNX Runtime fuses ``norm``, which lies in the main graph, found by giving it the norm alone.

    Norms of one form are asked about once. True where ONNX Runtime does not say.
    """
    form = ("fused", model.opset, _rank(norm), tuple((node.op, _plain(node.attrs)) for node in norm.nodes))
    if form not in context.memo:
        context.memo[form] = _ask(model, norm, context.provider)
    found: bool = context.memo[form]
    return found


def _ask(model: Model, norm: Norm, provider: str) -> bool:
    kind = norm.input.dtype if isinstance(norm.input.dtype, int) else norm.scale.onnx_type
    made = {id(tensor) for node in norm.nodes for tensor in node.outputs}
    constants: dict[str, onnx.TensorProto] = {}
    for tensor in (tensor for node in norm.nodes for tensor in node.inputs):
        folded = fold(tensor) if id(tensor) not in made else None
        if folded is not None:
            constants[tensor.name] = onnx.numpy_helper.from_array(folded.load(), tensor.name)
    nodes = [onnx.helper.make_node(node.op, [tensor.name for tensor in node.inputs], [tensor.name for tensor in node.outputs],
                                   **node.attrs) for node in topological(norm.nodes)]
    shape = [*([None] * (_rank(norm) - 1)), norm.width]
    graph = onnx.helper.make_graph(
        nodes, "norm", [onnx.helper.make_tensor_value_info(norm.input.name, kind, shape)],
        [onnx.helper.make_tensor_value_info(norm.output.name, norm.scale.onnx_type, shape)], list(constants.values()))
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opsets.items()]
    alone = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.proto.ir_version)
    try:
        executed = executed_ops(alone.SerializeToString(), provider=provider, threads=1)
    except InputError:
        return True
    return any(op in executed for op in _FUSED)


def _rank(norm: Norm) -> int:
    return len(norm.input.shape) if norm.input.shape else 3


def _plain(attrs: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, repr(value)) for key, value in sorted(attrs.items()))
