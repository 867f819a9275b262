"""Which names mean what where graphs lie inside graphs."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_graphsurgeon as gs

from .check import reads


def shadowed_names(graphs: Iterable[tuple[str, gs.Graph]]) -> set[str]:
    """Names that more than one of ``graphs`` defines: an inner node that says such a name may mean another value."""
    seen: set[str] = set()
    twice: set[str] = set()
    for _, graph in graphs:
        here = {tensor.name for tensor in (*graph.inputs, *graph.constants)}
        here |= {tensor.name for node in graph.nodes for tensor in node.outputs if tensor.name}
        twice |= here & seen
        seen |= here
    return twice


def free_names(graph: onnx.GraphProto) -> set[str]:
    """Names that ``graph`` reads or gives out without defining them."""
    defined = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {name for node in graph.node for name in node.output}
    read = {info.name for info in graph.output}
    for node in graph.node:
        read |= reads(node)
    return read - defined - {""}
