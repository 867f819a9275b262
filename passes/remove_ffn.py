"""remove-ffn: drop FFN blocks and keep the residual path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from ..graph.ffn import FFNBlock
from ..graph.model import Model
from .base import BlockPass, Context, Refused, Rewritten
from .bypass import bypass, measured_value
from .measure import mean_of, unmeasurable
from .scores import choose_blocks


@dataclass(frozen=True)
class RemoveFFN(BlockPass):
    """Remove FFN blocks and keep the residual path.

        y = x + f(x)   →   y = x                  keep=nothing
                       →   y = x + E[f(x)]        keep=mean     (needs feeds)

    What is between the block and the residual Add goes with it (a branch norm, a layer scale): the mean kept is that of
    what the Add receives. Blocks are given by ``blocks``, or the ``count`` (or ``fraction``) of those that score lowest
    are chosen: ``by=cosine``, block influence 1 − E[cos(r, r + f)] of the residual stream r before and after the block
    (ShortGPT, arXiv 2403.03853, and for single sublayers arXiv 2406.15786), or ``by=output``, the relative error
    ‖o' − o‖/‖o‖ of the model's outputs when that one block is removed.

    Does not fire on a block that an earlier pass removed or made affine. Where the branch into the Add also carries
    something else (attention, other experts), zeros (or the mean) take the block's place and the Add stays.
    """

    name: ClassVar[str] = "remove-ffn"
    exact: ClassVar[bool] = False
    keep: Literal["nothing", "mean"] = field(default="mean", metadata={"help": "what stays of the block's output"})
    count: int | None = field(default=None, metadata={"help": "remove this many blocks, chosen by score"})
    fraction: float | None = field(default=None, metadata={"help": "remove this part of the blocks, chosen by score"})
    by: Literal["cosine", "output"] = field(default="cosine", metadata={"help": "the score blocks are chosen by"})

    def __post_init__(self) -> None:
        if self.count is not None and self.fraction is not None:
            raise ValueError("give count or fraction, not both")
        if self.count is not None and self.count < 0:
            raise ValueError(f"count={self.count} is negative")
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is not between 0 and 1")

    @property
    def needs_feeds(self) -> bool:
        """A mean or a score has to be measured."""
        return self.keep == "mean" or self.count is not None or self.fraction is not None

    def choose(self, model: Model, blocks: dict[int, FFNBlock], context: Context) -> list[int]:
        """All, or the lowest by score."""
        if self.count is None and self.fraction is None:
            return list(blocks)
        count = self.count if self.count is not None else int(np.floor(self.fraction * len(blocks) + 0.5))  # type: ignore[operator]
        return choose_blocks(model, blocks, min(count, len(blocks)), self.by, context)

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """The mean of what the block adds, ``[d]``."""
        if self.keep == "nothing":
            return None
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        assert context.fit is not None
        mean = mean_of(model, measured_value(block), block.axis, context.fit, context)
        return Refused("no token of the feeds reached it", block.output.name) if mean is None else mean

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Take the block out."""
        bypass(model, block, statistics if isinstance(statistics, np.ndarray) else None)
        return Rewritten(gone="removed")
