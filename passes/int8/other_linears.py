"""The linears outside FFN blocks: attention, embeddings' projections, heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.edit import consumers, is_output
from ...graph.linear import Linear, read_linear
from ...graph.model import Model
from ...graph.shapes import ALIASES
from ...graph.sort import topological
from ..base import Refused
from .linear_groups import LinearGroup

Which = Literal["attention", "head", "everything"]
_SMALLEST = 1 << 14  # numbers in a weight; below, quantizing costs more than it saves
_WIDER = 4  # a head's output is at least so many times as wide as its input
_THROUGH = {*ALIASES, "Mul", "Div", "Tanh", "Add", "Sub", "Transpose"}
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
    for path, graph in model.graphs():
        for node in topological(graph.nodes):
            linear = read_linear(node) if id(node) not in inside else None
            if linear is None or linear.kind not in KINDS:
                continue
            reason = _reason_against(graph, linear, which)
            if reason is None:
                name = node.name.rsplit("/", 1)[0] if "/" in node.name.strip("/") else node.name
                groups.append(LinearGroup(name or "linear", path, graph, [linear]))
            elif reason:
                refused.append(Refused(reason, linear.output.name))
    return groups, refused


def _reason_against(graph: gs.Graph, linear: Linear, which: Which) -> str | None:
    """Why ``linear`` is not quantized: a clause; empty where that goes without saying; None where it can be."""
    if linear.axis != -1 or linear.experts != 1 or linear.gathered or linear.quantized or linear.fused_activation:
        return ""
    if linear.node.inputs[0] is not linear.input or linear.d_in * linear.d_out < _SMALLEST:
        return ""
    head = is_head(graph, linear)
    if which == "head" and not head:
        return ""
    if linear.overridable:
        return "its weight is an input of the graph, which the caller may override"
    return "it is the head (also=head and also=everything include it)" if head and which == "attention" else None


def is_head(graph: gs.Graph, linear: Linear) -> bool:
    """Whether ``linear`` gives logits: wide, and nothing but scaling and capping lies between it and an output."""
    if linear.d_out < _WIDER * linear.d_in:
        return False
    pending, depth = [linear.output], 0
    while pending and depth < 16:
        depth += 1
        tensor = pending.pop()
        if is_output(graph, tensor):
            return True
        pending += [node.outputs[0] for node in consumers(tensor) if node.op in _THROUGH]
    return False
