"""Whether a weight, or a value inside a linear, belongs to one reader alone, so that a rewrite of it reaches nothing else."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.constant import fold
from ...graph.edit import is_output
from ...graph.linear import Linear


def is_shared(linear: Linear) -> bool:
    """Whether anything but ``linear`` reads its weight, on the whole way from where it is stored."""
    return is_read_elsewhere(linear.node, 1)


def shows_inside(graph: gs.Graph, linear: Linear) -> bool:
    """Whether a value between the nodes of ``linear`` is an output of ``graph``: its product without its bias, say."""
    values = (tensor for node in linear.nodes for tensor in node.outputs)
    return any(tensor is not linear.output and is_output(graph, tensor) for tensor in values)


def is_free(source: gs.Tensor) -> bool:
    """Whether nothing but nodes reads ``source``: it is no output, here or of a graph inside."""
    home = getattr(source, "home", None)
    return not getattr(source, "captured", False) and (home is None or not is_output(home, source))


def is_read_elsewhere(node: gs.Node, index: int) -> bool:
    """Whether anything but input ``index`` of ``node`` reads the constant there, on the whole way from where it is stored."""
    folded = fold(node.inputs[index])
    if folded is None or not folded.sources or not is_free(folded.sources[0]):
        return True
    chain = {id(each) for each in (*folded.nodes, node)}
    values = [folded.sources[0], *(each.outputs[0] for each in folded.nodes)]
    return any(id(reader) not in chain for value in values for reader in value.outputs)
