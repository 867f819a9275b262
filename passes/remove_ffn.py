"""remove-ffn: drop FFN blocks, or leave the cheapest thing in their place that will do."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..graph.block import OVERRIDABLE, FFNBlock
from ..graph.model import Model
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .fitting.affine_map import why_no_map
from .fitting.damage import FEEDS, why_blind
from .fitting.evidence import Streams
from .fitting.ladder import Step, climb
from .fitting.measure import inside_subgraph
from .fitting.scores import lowest, score_blocks
from .fitting.stand_in import FITTED, RUNGS, Measured, StandIn
from .removal import check_selection, how_many, why_unscored

_WITHIN = 0.01
_UNSCORED = "blocks that remove-ffn would take out without a score"
_TAKEN = "what remove-ffn put in the place of each block"


@dataclass(frozen=True)
class RemoveFFN(BlockPass):
    """Remove FFN blocks and keep the residual path, with the least in their place that will do.

        y = r + f(x)   →   y = r                         keep=nothing
                       →   y = r + E[f(x)]               keep=mean       (this and the others need feeds)
                       →   y = s r, s = E[‖r + f‖/‖r‖]   keep=scale
                       →   y = r + x U V + c             keep=rank       U [d, k], V [k, d], k = ``rank``
                       →   y = r + x A + c               keep=affine
                       →   the first of these that moves the outputs by at most ``within``      keep=ladder

    What is between the block and the residual Add goes with it (a branch norm, a layer scale): the mean kept is that of
    what the Add receives. The maps are fitted as ``linearize-ffn`` fits them, and stand in the block's own place.

    ``within`` is a limit for each block by itself: how far putting this one thing in its place moves the outputs of the
    model as it is rewritten so far, on feeds that choose (mean KL divergence for logits, else ‖o' − o‖² / ‖o‖²). A block
    where nothing tried keeps to it stays.

    Blocks are given by ``blocks``, or the ``count`` (or ``fraction``) of those that score lowest
    are chosen: ``by=cosine``, block influence 1 − E[cos(r, r + f)] of the residual stream r before and after the block
    (ShortGPT, arXiv 2403.03853, and for single sublayers arXiv 2406.15786), or ``by=output``, the relative error
    ‖o' − o‖/‖o‖ of the model's outputs when that one block is removed.

    Does not fire on a block that an earlier pass removed or made affine; where what has to be measured cannot be (in subgraphs
    all but ``nothing``, and with ``within`` a block that the feeds that choose never run, or any where they give nothing to
    compare or the model itself gives numbers that are not finite); where it would be one of ``count`` without having a score;
    or, but for plain ``keep=nothing``, where the caller may override a weight. Where the branch into the Add also carries
    something else (attention, other experts), zeros (or the mean, or the map) take the block's place and the Add stays;
    ``scale`` is refused there. Source of ``scale``: AdaSkip, arXiv 2501.02336.
    """

    name: ClassVar[str] = "remove-ffn"
    exact: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    keep: Literal["nothing", "mean", "scale", "rank", "affine", "ladder"] = field(
        default="mean", metadata={"help": "what stays of the block's output"})
    rank: float = field(default=0.25, metadata={"help": "rank of keep=rank; below 1 a part of the width"})
    within: float | None = field(default=None, metadata={
        "help": f"how far a block may move the outputs; none: no limit, {_WITHIN} for keep=ladder"})
    count: int | None = field(default=None, metadata={"help": "remove this many blocks, chosen by score"})
    fraction: float | None = field(default=None, metadata={"help": "remove this part of the blocks, chosen by score"})
    by: Literal["cosine", "output"] = field(default="cosine", metadata={"help": "the score blocks are chosen by"})

    def __post_init__(self) -> None:
        check_selection(self.count, self.fraction)
        if not self.rank > 0 or (self.rank >= 1 and self.rank != int(self.rank)):
            raise ValueError(f"rank={self.rank} must be a whole number, or a part of the width below 1")
        if self.within is not None and not self.within >= 0:
            raise ValueError(f"within={self.within} must be 0 or more")

    @property
    def needs_feeds(self) -> bool:
        """Anything but plain removal of given blocks has to be measured."""
        return self.keep != "nothing" or any(each is not None for each in (self.within, self.count, self.fraction))

    @property
    def _limited(self) -> bool:
        """Whether what it does to the outputs decides."""
        return self.within is not None or self.keep == "ladder"

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be measured or fitted, whatever the feeds."""
        if (self.keep != "nothing" or self._limited) and block.overridable:
            return Refused(OVERRIDABLE, block.output.name)
        if self.keep in ("nothing", "ladder"):
            return None
        if block.path != "main":
            return inside_subgraph(block)
        return why_no_map(block) if self.keep in FITTED else None

    def choose(self, model: Model, blocks: dict[int, FFNBlock], context: Context) -> list[int]:
        """All, or the lowest by score."""
        if self.count is None and self.fraction is None:
            return list(blocks)
        scores = score_blocks(model, blocks, self.by, context)
        chosen, unscored = lowest(scores, how_many(self.count, self.fraction, len(blocks)))
        context.memo[_UNSCORED].update(unscored)
        return chosen

    def run(self, model: Model, context: Context) -> PassResult:
        """Take the blocks out, each measured on what the ones before it have become."""
        blind = self._why_blind(model, context)
        if blind is not None:
            return self.refuse_all(blind, context)
        taken: dict[int, Step] = {}
        with ExitStack() as stack:
            streams = stack.enter_context(Streams(model, context)) if {self.keep} & {*FITTED, "ladder"} else None
            memo = {**context.memo, _TAKEN: taken, _UNSCORED: set[int]()}
            result = super().run(model, dataclasses.replace(context, streams=streams, memo=memo))
        notes = [f"block {index}: {step.stand_in.rung}, which moves the outputs by {step.damage:.3g}"
                 + (f" ({step.tried})" if step.tried else "") for index, step in sorted(taken.items())]
        return dataclasses.replace(result, notes=(*result.notes, *notes))

    def _why_blind(self, model: Model, context: Context) -> Refused | None:
        """Why the feeds that choose cannot tell what is asked of them."""
        scored = self.by == "output" and (self.count is not None or self.fraction is not None)
        if not scored and not self._limited:
            return None
        assert context.choose is not None
        return why_blind(model, context.choose if scored else context.choose[:FEEDS], context)

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """What takes the block's place."""
        if block.index in context.memo.get(_UNSCORED, ()):
            return Refused(why_unscored(self.by), block.output.name)
        width = min(block.d_model, block.d_out)
        rank = int(self.rank) if self.rank >= 1 else max(1, int(self.rank * width))
        measured = Measured(model, block, context, rank)
        if self.keep != "ladder" and self.within is None:
            return measured.stand_in(self.keep)
        step = climb(measured, RUNGS if self.keep == "ladder" else [self.keep],
                     _WITHIN if self.within is None else self.within, self.name)
        if isinstance(step, Refused):
            return step
        context.memo[_TAKEN][block.index] = step
        return step.stand_in

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Take the block out."""
        assert isinstance(statistics, StandIn)
        return statistics.put(model, block, context)
