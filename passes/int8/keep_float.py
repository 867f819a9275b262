"""Which blocks are better left in float (``keep_float=``)."""

from __future__ import annotations

from collections.abc import Mapping

from ...graph.block import FFNBlock
from ...graph.model import Model
from ..base import BlockPass, Context
from ..proof.per_block import drift_per_block
from .trial import attempt, positions

_FEEDS = 4  # of those to choose by, spread evenly


def worst_blocks(model: Model, each: BlockPass, blocks: Mapping[int, FFNBlock], limit: float,
                 context: Context) -> dict[int, float]:
    """The blocks that cost most when they alone are rewritten, with what they cost: the largest ``rel_l2`` of an output.

    Args:
        each: the pass as it is without this choice.
        blocks: those that it would rewrite, by index.
        limit: how many blocks (1 or more), or the drift (below 1) from which on a block is left alone.

    Returns:
        index → drift. Blocks that nothing can be said of (in subgraphs) are not among them.
    """
    assert context.choose is not None
    feeds = context.choose[::max(1, len(context.choose) // _FEEDS)][:_FEEDS]
    at = positions(model, blocks.values())
    index_of = {id(block): index for index, block in blocks.items()}
    context.progress(f"{each.name}: what each block costs alone")
    candidate = attempt(model, each, at, context)
    found = drift_per_block(model.copy(), candidate, feeds, provider=context.provider, threads=context.threads)
    damage = {index_of[id(at[one.block])]: one.damage for one in found if one.block in at and one.reason is None}
    worst = sorted(damage, key=lambda index: -damage[index])
    if limit >= 1:
        return {index: damage[index] for index in worst[:int(limit)]}
    return {index: damage[index] for index in worst if not damage[index] <= limit}
