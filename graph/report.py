"""What ``inspect`` says about a model (the contract's object)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx

from .block import FFNBlock
from .errors import about
from .ffn import find_ffn_blocks
from .model import Model
from .tensors import initializers
from .types import bits_of
from .weights import size_of


def describe(path: Path) -> dict[str, object]:
    """The inspection of the model in ``path``.

    Raises:
        InputError: it cannot be read.
    """
    with about(path):
        return _describe(path, Model.load(path))


def _describe(path: Path, model: Model) -> dict[str, object]:
    before = model.proto
    nodes = count_nodes(before.graph.node) + sum(count_nodes(function.node) for function in before.functions)
    parameters = sum(size_of(tuple(tensor.dims)) for tensor in initializers(before) if bits_of(tensor.data_type))
    producer = f"{before.producer_name} {before.producer_version}".strip()
    found = find_ffn_blocks(model)
    return {"model": str(path), "opset": model.opset, "producer": producer, "nodes": nodes, "parameters": parameters,
            "ffn_blocks": [describe_block(block) for block in found],
            "rejected": [{"value": each.value, "reason": each.reason} for each in found.rejected]}


def describe_block(block: FFNBlock) -> dict[str, object]:
    """The contract's entry for one block."""
    return {"index": block.index, "name": block.name, "graph": block.path, "d_model": block.d_model, "d_ff": block.d_ff,
            "d_out": block.d_out, "activation": block.activation.name, "gated": block.gated, "up_bias": block.up.has_bias,
            "down_bias": block.down_bias, "parallel": block.parallel, "experts": block.experts,
            "shares_weights_with": block.shares_weights_with, "parameters": block.parameters,
            "macs_per_token": block.macs_per_token, "input": block.input.name, "output": block.output.name}


def count_nodes(nodes: Iterable[onnx.NodeProto]) -> int:
    """Nodes, and those of the graphs inside them."""
    total = 0
    pending = [nodes]
    while pending:
        for node in pending.pop():
            total += 1
            for attribute in node.attribute:
                pending += [graph.node for graph in (*([attribute.g] if attribute.HasField("g") else []),
                                                     *attribute.graphs)]
    return total
