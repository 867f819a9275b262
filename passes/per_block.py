"""Blocks of two models that can be compared one by one."""

from __future__ import annotations

from ..graph.ffn import find_ffn_blocks
from ..graph.model import Model


def shared_block_outputs(reference: Model, candidate: Model) -> dict[int, str]:
    """Index of a block of ``reference`` → its output value, for those whose value ``candidate`` computes too.

    Rewrites keep the name of what they replace, so this finds the blocks that were rewritten but not removed.
    """
    there = {tensor.name for node in candidate.graph.nodes for tensor in node.outputs if tensor.name}
    return {block.index: block.output.name for block in find_ffn_blocks(reference)
            if block.path == "main" and block.output.name in there}
