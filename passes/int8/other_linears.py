"""The linears outside FFN blocks: attention, embeddings' projections, heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.edit import consumers
from ...graph.linear import Linear, read_linear
from ...graph.model import Model
from ...graph.shapes import ALIASES
from ...graph.sort import topological
from ..base import Refused
from .linear_groups import LinearGroup

Which = Literal["attention", "head", "everything"]
_SMALLEST = 1 << 14  # numbers in a weight; below, quantizing costs more than it saves
_WIDER = 4  # a head's output is at least so many times as wide as its input
_EITHER = {"Mul", "Add"}  # whichever of its inputs the value is
_THROUGH = {*ALIASES, *_EITHER, "Div", "Tanh", "Sub", "Transpose", "Softmax", "LogSoftmax", "Sigmoid", "ArgMax", "TopK", "Gather",
            "GatherElements", "GatherND", "Slice"}
_FAR = 16  # values that are followed
NO_HEAD = (f"no linear gives logits here: one that is {_WIDER} times as wide as its input or more, and has nothing behind it but "
           "scaling, capping, softmax and picking up to an output of the model")
KINDS = ("MatMul", "Gemm", "FusedMatMul", "Einsum")


def other_groups(model: Model, blocks: Iterable[FFNBlock], which: Which) -> tuple[list[LinearGroup], list[Refused]]:
    """The linears with constant weights that belong to no FFN block, and why some of them stay as they are.

    Args:
        blocks: every block that the model has, also those that are not to be quantized.
        which: those of attention (and whatever else is no head), the language-model head, or both.
    """
    inside = {id(linear.node) for block in blocks for linear in block.linears()}
    groups: list[LinearGroup] = []
    refused: list[Refused] = []
    branches = {id(branch): (graph, node) for _, graph in model.graphs() for node in graph.nodes if node.op == "If"
                for branch in node.attrs.values() if isinstance(branch, gs.Graph)}
    for path, graph in model.graphs():
        for node in topological(graph.nodes):
            linear = read_linear(node) if id(node) not in inside else None
            if linear is None or linear.kind not in KINDS:
                continue
            reason = _reason_against(linear, which, _gives_logits(model, branches, graph, linear))
            if reason is None:
                name = node.name.rsplit("/", 1)[0] if "/" in node.name.strip("/") else node.name
                groups.append(LinearGroup(name or "linear", path, graph, [linear]))
            elif reason:
                refused.append(Refused(reason, linear.output.name))
    return groups, refused


def _reason_against(linear: Linear, which: Which, head: bool) -> str | None:
    """Why ``linear`` is not quantized: a clause; empty where that goes without saying; None where it can be."""
    if head and linear.quantized and which == "head":
        return "its weights are stored as integers already"
    if linear.axis != -1 or linear.experts != 1 or linear.gathered or linear.quantized or linear.fused_activation:
        return ""
    if linear.node.inputs[0] is not linear.input or linear.d_in * linear.d_out < _SMALLEST:
        return ""
    if which == "head" and not head:
        return ""
    if linear.overridable:
        return "its weight is an input of the graph, which the caller may override"
    return "it is the head (also=head and also=everything include it)" if head and which == "attention" else None


def _gives_logits(model: Model, branches: Mapping[int, tuple[gs.Graph, gs.Node]], graph: gs.Graph, linear: Linear) -> bool:
    """Whether ``linear`` is wide, and nothing but what ``_THROUGH`` does lies between it and an output of the model.

    Args:
        branches: identity of a branch of an If → where that If is.
    """
    if linear.d_out < _WIDER * linear.d_in:
        return False
    pending, followed = [(graph, linear.output)], 0
    while pending and followed < _FAR:
        followed += 1
        place, tensor = pending.pop()
        for position, output in enumerate(place.outputs):
            if tensor is output and place is model.graph:
                return True
            if tensor is output and id(place) in branches:
                outside, chooser = branches[id(place)]
                pending.append((outside, chooser.outputs[position]))
        pending += [(place, output) for node in consumers(tensor) if node.op in _THROUGH
                    and (node.inputs[0] is tensor or node.op in _EITHER) for output in node.outputs]
    return False
