"""What remove-attention and remove-layer share: which go, one after the other, and how they are scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from ..graph.ffn import find_ffn_blocks
from ..graph.layers import Layer, find_layers
from ..graph.model import Model
from .base import Context, Pass, PassResult, Refused
from .blocks import ALL, Blocks
from .fitting.damage import why_blind
from .fitting.measure import unmeasurable
from .fitting.scores import lowest, output_error


def check_selection(count: int | None, fraction: float | None) -> None:
    """Complain of a ``count`` and a ``fraction`` that make no sense.

    Raises:
        ValueError: they do not.
    """
    if count is not None and fraction is not None:
        raise ValueError("give count or fraction, not both")
    if count is not None and count < 0:
        raise ValueError(f"count={count} is negative")
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} is not between 0 and 1")


def how_many(count: int | None, fraction: float | None, there: int) -> int:
    """How many of ``there`` go."""
    if count is None and fraction is None:
        return there
    return min(there, count if count is not None else int(np.floor(fraction * there + 0.5)))  # type: ignore[operator]


def why_unscored(by: str) -> str:
    """Why one of several is left that has no score to be chosen by."""
    return (f"by={by} gives it no score on the feeds that choose" + (" (by=output may)" if by == "cosine" else ""))


@dataclass(frozen=True)
class Removal(Pass):
    """Takes out parts of layers, which are named by the FFN block in them.

    Attributes:
        gone: whether the FFN blocks go too.
    """

    gone: ClassVar[bool] = False

    blocks: Blocks = field(default=ALL, metadata={"help": "which layers, by their FFN blocks, e.g. 0+3-5"})
    count: int | None = field(default=None, metadata={"help": "remove this many, chosen by score"})
    fraction: float | None = field(default=None, metadata={"help": "remove this part of them, chosen by score"})
    by: Literal["cosine", "output"] = field(default="cosine", metadata={"help": "the score they are chosen by"})

    def __post_init__(self) -> None:
        check_selection(self.count, self.fraction)

    @property
    def needs_feeds(self) -> bool:
        """Only what is chosen by score has to be measured."""
        return self.count is not None or self.fraction is not None

    def why_not(self, layer: Layer) -> Refused | None:
        """Why nothing can be taken out of ``layer``; None where it can."""
        raise NotImplementedError

    def take_out(self, model: Model, layer: Layer, context: Context) -> Refused | None:
        """Take it out, or say why not and change nothing."""
        raise NotImplementedError

    def influence(self, model: Model, layer: Layer, context: Context) -> float:
        """1 − E[cos] of the residual stream before and after what would go."""
        raise NotImplementedError

    def run(self, model: Model, context: Context) -> PassResult:
        """Take the chosen ones out."""
        there, refused = context.ledger.select(self.blocks)
        layers, rejected = find_layers(model, context.ledger.blocks.values())
        refused += [Refused(each.reason, each.value) for each in rejected]
        for index, block in there.items():
            layer = layers.get(index)
            refusal = (Refused("there is no attention in front of it", block.input.name) if layer is None
                       else self.why_not(layer) or self._unseen(model, layer))
            if refusal is not None:
                refused.append(Refused(refusal.reason, refusal.value, index))
                layers.pop(index, None)
        candidates = {index: layers[index] for index in there if index in layers}
        chosen, unchosen = self._choose(model, candidates, context)
        refused += unchosen
        fired = 0
        for index in chosen:
            context.progress(f"{self.name}: layer of block {index}")
            candidates[index].settle()
            outcome = self.take_out(model, candidates[index], context)
            if outcome is not None:
                refused.append(Refused(outcome.reason, outcome.value, index))
                continue
            fired += 1
            if self.gone:
                context.ledger.close(index, f"removed by {self.name} earlier in the plan")
        return self.result(fired, sorted(refused, key=lambda each: -1 if each.block is None else each.block))

    def _unseen(self, model: Model, layer: Layer) -> Refused | None:
        return unmeasurable(model, layer.attention[0]) if self.needs_feeds else None

    def _choose(self, model: Model, layers: dict[int, Layer], context: Context) -> tuple[list[int], list[Refused]]:
        """The indices of what goes, and why others that would be among them stay."""
        count = how_many(self.count, self.fraction, len(layers))
        if not self.needs_feeds or count == len(layers):
            return list(layers), []
        assert context.choose is not None
        blind = why_blind(model, context.choose, context) if self.by == "output" else None
        if blind is not None:
            return [], [Refused(blind.reason, blind.value, index) for index in layers]
        scores = {}
        for index, layer in layers.items():
            context.progress(f"{self.name}: scoring the layer of block {index}")
            scores[index] = (self.influence(model, layer, context) if self.by == "cosine"
                             else output_error(model, partial(self._try, layer=layer, context=context), context))
        chosen, unscored = lowest(scores, count)
        reason = why_unscored(self.by)
        return ([index for index in chosen if index not in unscored],
                [Refused(reason, layers[index].block.output.name, index) for index in unscored])

    def _try(self, trial: Model, *, layer: Layer, context: Context) -> bool:
        layers, _ = find_layers(trial, find_ffn_blocks(trial))
        same = next((other for other in layers.values() if other.block.output.name == layer.block.output.name
                     and other.block.path == layer.block.path), None)
        return same is not None and self.take_out(trial, same, context) is None
