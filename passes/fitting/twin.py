"""A block once more, on another input, with the same weights: its nodes copied, its constants shared."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.builder import Builder
from ...graph.constant import fold
from ...graph.edit import producer
from ...graph.model import Model
from ..base import Refused

_MOST = 400


def own_nodes(block: FFNBlock) -> list[gs.Node] | Refused:
    """Every node between the input of ``block`` and its output, producers first, or what else they read."""
    order: list[gs.Node] = []
    state: dict[int, bool] = {}
    pending: list[tuple[gs.Tensor, bool]] = [(block.output, False)]
    while pending:
        tensor, done = pending.pop()
        node = producer(tensor)
        if tensor is block.input or not tensor.name or fold(tensor) is not None:
            continue
        if node is None:
            return Refused("what is between its projections also reads another value", tensor.name)
        if done:
            if not state[id(node)]:
                state[id(node)] = True
                order.append(node)
            continue
        if id(node) in state:
            continue
        if len(state) > _MOST or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            return Refused("what is between its projections also reads another value", tensor.name)
        state[id(node)] = False
        pending.append((tensor, True))
        pending += [(value, False) for value in node.inputs]
    return order


def twin(model: Model, of: FFNBlock, block: FFNBlock) -> gs.Tensor | Refused:
    """Add what ``of`` computes, on the input of ``block``; nothing reads it yet.

    Returns:
        The value ``[*, d_out]``, or why there is none.
    """
    nodes = own_nodes(of)
    if isinstance(nodes, Refused):
        return nodes
    build = Builder(model, block.graph, block.name, block.onnx_type)
    values: dict[int, gs.Tensor] = {id(of.input): block.input}
    alike = of.input.shape is not None and of.input.shape == block.input.shape
    for node in nodes:
        outputs: list[gs.Tensor] = []
        for old in node.outputs:
            new = build.value("twin") if old.name else gs.Variable.empty()
            new.dtype, new.shape = old.dtype, old.shape if alike else None
            values[id(old)] = new
            outputs.append(new)
        inputs = [values.get(id(value), value) for value in node.inputs]
        build.nodes(node.op, inputs, outputs, domain=node.domain or "", hint=f"twin_{node.op}", **dict(node.attrs))
    return values[id(of.output)]
