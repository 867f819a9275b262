"""clean-up: what computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from ..graph.constant import fold
from ..graph.edit import is_output, producer, remove_dead, substitute
from ..graph.export import constants_read
from ..graph.model import Model
from ..graph.scope import shadowed_names
from .base import Context, Pass, PassResult, Refused

_PURE = (None, "", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Operator sets whose operators do nothing but compute their outputs."""
_IMPURE = frozenset({"PythonOp", "PythonOpGrad", "Print"})


@dataclass(frozen=True)
class CleanUp(Pass):
    """Take out what computes nothing.

        y = Identity(x)                                   →  x
        y = Dropout(x), not training, its mask unread     →  x
        a node whose outputs nobody reads                 →  (gone), and what only it read
        an initializer, a value_info that nobody names    →  (gone)

    Names of graph inputs and outputs stay: where an Identity makes an output, the node before it makes it instead.

    Does not fire on an Identity between an input (an initializer, another output, a value of the graph around) and an
    output, which ONNX needs; on a Dropout that may train; on dead nodes of operator sets it does not know, which may do
    more than compute; on initializers that are inputs too, which are part of the interface; on a model without outputs, of
    which nothing would be left.
    """

    name: ClassVar[str] = "clean-up"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Clean every graph, inner ones too."""
        if not model.graph.outputs:
            return self.result(0, [])
        shadowed = shadowed_names(model.graphs())
        refused: list[Refused] = []
        fired = 0
        for _, graph in model.graphs():
            bypassed = []
            for node in list(graph.nodes):
                outcome = _bypass(model, graph, node, shadowed)
                if isinstance(outcome, Refused):
                    refused.append(outcome)
                elif outcome:
                    bypassed.append(node)
            fired += len(bypassed)
            remove_dead(graph, bypassed)
        for _, graph in reversed(model.graphs()):  # inner ones first: what only they read is dead then
            fired += remove_dead(graph, graph.nodes, _is_pure)
        return self.result(fired + _sweep(model), refused)


def _is_pure(node: gs.Node) -> bool:
    return node.domain in _PURE and node.op not in _IMPURE


def _bypass(model: Model, graph: gs.Graph, node: gs.Node, shadowed: set[str]) -> bool | Refused:
    """Take ``node`` out of the way if all it does is to pass its input on."""
    if node.domain not in (None, "", "ai.onnx") or node.op not in ("Identity", "Dropout"):
        return False
    if not node.inputs or not node.outputs or not node.inputs[0].name or not node.outputs[0].name:
        return False
    x, y = node.inputs[0], node.outputs[0]
    if node.op == "Dropout":
        reason = _reason_to_keep(model, graph, node)
        if reason is not None:
            return Refused(reason, y.name)
    if is_output(graph, y):
        maker = producer(x)
        if maker is None or is_output(graph, x) or all(maker is not other for other in graph.nodes):
            return False
        if y.name in shadowed and len(x.outputs) > 1:
            return False
    elif x.name in shadowed:
        return False
    substitute(graph, y, x)
    return True


def _reason_to_keep(model: Model, graph: gs.Graph, node: gs.Node) -> str | None:
    """Why a Dropout may do something; None where it passes its input on."""
    if any(mask.name and (mask.outputs or is_output(graph, mask)) for mask in node.outputs[1:]):
        return "the mask of the Dropout is read"
    if model.opset < 7 and not node.attrs.get("is_test", 0):
        return "the Dropout trains (is_test is 0)"
    if model.opset >= 12 and len(node.inputs) > 2 and node.inputs[2].name:
        training = fold(node.inputs[2])
        if training is None or training.overridable or training.load().any():
            return "the Dropout may train (training_mode is not false)"
    return None


def _sweep(model: Model) -> int:
    """Mark the graphs that hold initializers or value_info nobody needs, so that they are written without."""
    read = {id(constant) for constant in constants_read(model.graph.nodes)}
    fired = 0
    for _, graph in model.graphs():
        if graph.swept or model.proto.training_info:
            continue
        named = {id(tensor) for tensor in graph.outputs}
        named |= {id(constant) for constant in graph.constants if constant.name in _annotated(graph.origin)}
        unused = [constant for constant in graph.constants if not constant.was_used and id(constant) not in read | named
                  and not getattr(constant, "captured", False)]
        for constant in unused:
            constant.was_used = True
        stale = _stale(graph.origin)
        graph.swept = bool(unused) or stale > 0
        fired += len(unused) + stale
    return fired


def _annotated(graph: onnx.GraphProto) -> set[str]:
    """Names of scales and zero points in the quantization annotations of ``graph``."""
    return {entry.value for note in graph.quantization_annotation for entry in note.quant_parameter_tensor_names}


def _stale(graph: onnx.GraphProto) -> int:
    """How many value_info entries are about values that ``graph`` does not have."""
    known = {info.name for info in (*graph.input, *graph.output)} | {tensor.name for tensor in graph.initializer}
    known |= {name for node in graph.node for name in node.output}
    return sum(info.name not in known for info in graph.value_info)
