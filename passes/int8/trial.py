"""A pass tried on a copy of the model, so that it can be measured before it is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ...graph.block import FFNBlock
from ...graph.ffn import find_ffn_blocks
from ...graph.model import Model
from ..base import BlockPass, Context
from ..blocks import Blocks
from ..ledger import Ledger


def positions(model: Model, blocks: Iterable[FFNBlock]) -> dict[int, FFNBlock]:
    """Where ``blocks`` of the model in work stand in ``inspect`` of a copy of it as it is now: position → block."""
    wanted = {block.output.name: block for block in blocks}
    return {found.index: wanted[found.output.name] for found in find_ffn_blocks(model.copy()) if found.output.name in wanted}


def attempt(model: Model, each: BlockPass, at: Iterable[int], context: Context) -> Model:
    """A copy of ``model`` with ``each`` done to the blocks that stand at the positions ``at``."""
    copy = model.copy()
    fresh = dataclasses.replace(context, ledger=Ledger(copy), memo={}, streams=None, widths={})
    dataclasses.replace(each, blocks=Blocks(tuple(at))).run(copy, fresh)
    return copy
