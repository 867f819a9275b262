"""share-ffn: blocks that do alike share one set of weights, each with an affine fix of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..graph.block import FFNBlock
from ..graph.builder import Builder
from ..graph.edit import producer, remove_dead
from ..graph.model import Model
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .fitting.affine_map import why_no_map
from .fitting.evidence import Evidence, Streams
from .fitting.likeness import choose_keepers, distances
from .fitting.measure import inside_subgraph, unmeasurable
from .fitting.neuron_fit import Features, choose_ridge, refit
from .fitting.twin import own_nodes, twin

Array = npt.NDArray[Any]
_KEEPERS = "whose weights each block takes"


@dataclass(frozen=True)
class Tie:
    """What takes a block's place: another's function on its own input, with what is put around that.

    Attributes:
        value: f_k(x). keeper: k.
        inner: A ``[d_model, d_out]`` of x, or None; outer: B ``[d_out, d_out]``, or one number a feature, or None.
        offset: c ``[d_out]``, or None.
    """

    value: gs.Tensor
    keeper: int
    inner: Array | None = None
    outer: Array | None = None
    offset: Array | None = None


@dataclass(frozen=True)
class ShareFFN(BlockPass):
    """Tie blocks whose functions are close on the feeds to one set of weights.

        y_b = f_b(x)   →   y_b = f_k(x) B + x A + c      fix=affine    A [d_model, d_out], B [d_out, d_out]
                       →   y_b = f_k(x) ∘ s + c          fix=scale     s, c [d_out]
                       →   y_b = f_k(x)                  fix=none

    ``groups`` sets of weights stay (a part of the blocks where it is below 1); which, and who takes which, is chosen by what the
    error after the best fix is beside the residual stream (see :mod:`likeness`). The file stores each set once. The
    fixes are fitted in order of execution as ``slim-ffn`` fits: on what the rewritten blocks before give, towards what the
    original model has there.

    Does not fire on blocks inside subgraphs, on packed experts, on weights that the caller may override, on blocks with a norm
    over their neurons, or that share their weights already, nor where ``fix=affine`` has fewer tokens than features. Blocks
    further apart than eight are not tied.

    Source: sharing among layers, arXiv 2309.01826, 2202.07959, 2402.16840 (trained so there); the fix, docs/approximations.md.
    """

    name: ClassVar[str] = "share-ffn"
    exact: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    groups: float = field(default=0.5, metadata={"help": "sets of weights that stay; below 1 a part of the blocks"})
    fix: Literal["affine", "scale", "none"] = field(default="affine", metadata={"help": "what each tied block has of its own"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Literal["stream", "block"] = field(default="stream", metadata={"help": "what is fitted to"})
    vary: int = field(default=0, metadata={"help": "varied copies of each feed to fit on beside it"})

    def __post_init__(self) -> None:
        if self.vary < 0:
            raise ValueError(f"vary={self.vary}: copies cannot be fewer than none")
        if not self.groups > 0 or (self.groups >= 1 and self.groups != int(self.groups)):
            raise ValueError(f"groups={self.groups} must be a whole number, or a part of the blocks between 0 and 1")

    @property
    def needs_feeds(self) -> bool:
        """Always: likeness is measured."""
        return True

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be tied."""
        if block.region.inner_norm:
            return Refused("its neurons are normed together", block.output.name)
        if block.shares_weights_with is not None:
            return Refused(f"it shares its weights with block {block.shares_weights_with} already", block.output.name)
        if block.path != "main":
            return inside_subgraph(block)
        nodes = own_nodes(block)
        return why_no_map(block) or (nodes if isinstance(nodes, Refused) else None)

    def run(self, model: Model, context: Context) -> PassResult:
        """Choose who takes whose weights, then tie one after the other."""
        keepers: dict[int, int] = {}
        with Streams(model, context, self.vary) as streams:
            memo = {**context.memo, _KEEPERS: keepers}
            result = super().run(model, dataclasses.replace(context, streams=streams, memo=memo))
        refused = {each.block for each in result.refused}
        tied = {index: keeper for index, keeper in keepers.items() if index not in refused}
        if self.fix == "affine":
            for keeper in set(tied.values()):
                context.ledger.close(keeper, f"other blocks are tied to its weights by {self.name} earlier in the plan")
        notes = [f"block {index}: the weights of block {keeper}" for index, keeper in sorted(tied.items())]
        return dataclasses.replace(result, notes=(*result.notes, *notes))

    def choose(self, model: Model, blocks: dict[int, FFNBlock], context: Context) -> list[int]:
        """Those that give up their weights."""
        left = int(self.groups) if self.groups >= 1 else max(1, round(self.groups * len(blocks)))
        if left >= len(blocks):
            return []
        cost = distances(model, list(blocks.values()), self.fix, self.weight, context)
        keepers = choose_keepers(cost, list(blocks), left)
        context.memo[_KEEPERS].update(keepers)
        return list(keepers)

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """The other's function on this block's input, and the fix."""
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        keeper = context.memo[_KEEPERS][block.index]
        other = context.ledger.blocks[keeper]
        other.settle()
        value = twin(model, other, block)
        if isinstance(value, Refused) or self.fix == "none":
            return value if isinstance(value, Refused) else Tie(value, keeper)
        tie = self._fit(block, value, keeper, context)
        if isinstance(tie, Refused):
            made = producer(value)
            remove_dead(block.graph, [made] if made is not None else [])
        return tie

    def _fit(self, block: FFNBlock, value: gs.Tensor, keeper: int, context: Context) -> Tie | Refused:
        assert context.streams is not None
        affine = self.fix == "affine"
        evidence = context.streams.evidence(block, inputs=affine, neurons=False, weight=self.weight, target=self.target,
                                            more=[value])
        inputs = block.d_model if affine else 0
        if evidence.rows < inputs + block.d_out and (affine or not evidence.rows):
            return Refused(f"{evidence.rows} tokens are too few for {inputs + block.d_out} features: give more feeds",
                           block.input.name)
        return _affine_fix(block, value, keeper, evidence) if affine else _scale_fix(block, value, keeper, evidence)

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the other's function, fixed, in the block's place."""
        tie = statistics
        assert isinstance(tie, Tie)
        build = Builder(model, block.graph, block.name, block.onnx_type)
        y, axis = tie.value, block.axis
        if tie.outer is not None and tie.outer.ndim == 1:
            y = build.op("Mul", y, build.vector(tie.outer, axis, "share_scale"), hint="share_scaled")
            y = build.op("Add", y, build.vector(tie.offset, axis, "share_offset"), hint="share_shifted")  # type: ignore[arg-type]
        elif tie.outer is not None:
            y = build.linear(y, tie.outer, None, axis=axis, hint="share_outer")
            beside = build.linear(block.input, tie.inner, tie.offset, axis=axis, hint="share_inner")  # type: ignore[arg-type]
            y = build.op("Add", y, beside, hint="share_sum")
        block.replace(y)
        if context.streams is not None:
            context.streams.rewritten(block.output.name)
        return Rewritten(gone=f"tied to block {tie.keeper}" if self.fix == "affine" else None)


def _affine_fix(block: FFNBlock, value: gs.Tensor, keeper: int, evidence: Evidence) -> Tie:
    """A, B and c by least squares; where the feeds say nothing A is 0 and B the identity."""
    prior = np.concatenate([np.zeros((block.d_model, block.d_out)), np.eye(block.d_out)])
    everything = Features.of(evidence.everything(), prior, block.d_model)
    halves = bool(evidence.fit.rows and evidence.held_out.rows)
    fit = Features.of(evidence.fit, prior, block.d_model) if halves else everything
    held_out = Features.of(evidence.held_out, prior, block.d_model) if halves else None
    all_of_them = np.arange(block.d_out)
    found = refit(everything, all_of_them, *choose_ridge(fit, held_out, all_of_them))
    return Tie(value, keeper, found.affine, found.matrix, found.offset)


def _scale_fix(block: FFNBlock, value: gs.Tensor, keeper: int, evidence: Evidence) -> Tie:
    """One number for each feature, and an offset, by least squares."""
    moments, width = evidence.everything(), block.d_out
    covariance, mean = moments.covariance, moments.mean
    variance = np.diag(covariance)[:width]
    scale = np.diag(covariance[:width, width:]) / np.maximum(variance, 1e-30)
    scale = np.where(variance > 1e-12 * max(float(variance.max(initial=0)), 1e-30), scale, 1.0)
    return Tie(value, keeper, None, scale, mean[width:] - scale * mean[:width])
