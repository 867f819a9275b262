"""Sizes that a graph computes as numbers with a fraction: Shape → Cast → Div, Sqrt, Floor → Cast → Reshape or Resize."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs

from ...graph.constant import fold
from ...graph.edit import producer
from ...graph.model import Model

_SOURCES = ("Shape", "Size")
_MOST = 64  # nodes; a size takes a dozen
_INTEGERS = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}


def sizes(model: Model) -> Iterator[str]:
    """A value of every Cast to integers that sizes and constants alone reach, and of every node between.

    Where they are constants all the same, ONNX Runtime folds them only if it has a kernel for their type.
    """
    for _, graph in model.graphs():
        for node in graph.nodes:
            if node.op == "Cast" and node.attrs.get("to") in _INTEGERS and node.inputs:
                cone = _cone(node.inputs[0])
                yield from (each.outputs[0].name for each in (*cone, *([node] if cone else [])))


def _cone(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that compute ``tensor`` from sizes and constants; none where it depends on anything else."""
    pending, found = [tensor], dict[int, gs.Node]()
    while pending:
        value = pending.pop()
        node = producer(value)
        if node is None and (not value.name or fold(value) is not None):
            continue
        if node is None or len(found) >= _MOST:
            return []
        if node.op not in _SOURCES and id(node) not in found:
            found[id(node)] = node
            pending += node.inputs
    return list(found.values())
