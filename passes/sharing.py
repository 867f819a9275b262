"""Whether a weight belongs to one reader alone, so that a rewrite of it unties nothing."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..graph.constant import fold
from ..graph.edit import is_output
from ..graph.linear import Linear


def is_shared(linear: Linear) -> bool:
    """Whether anything but ``linear`` reads its weight, on the whole way from where it is stored."""
    folded = fold(linear.node.inputs[1])
    if folded is None or linear.source is None or not is_free(linear.source):
        return True
    chain = {id(node) for node in (*folded.nodes, linear.node)}
    values = [linear.source, *(node.outputs[0] for node in folded.nodes)]
    return any(id(reader) not in chain for value in values for reader in value.outputs)


def is_free(source: gs.Tensor) -> bool:
    """Whether nothing but nodes reads ``source``: it is no output, here or of a graph inside."""
    home = getattr(source, "home", None)
    return not getattr(source, "captured", False) and (home is None or not is_output(home, source))
