"""slim-ffn: some of the neurons of each FFN, and a down projection fitted to do the work of all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..graph.block import FFNBlock
from ..graph.builder import Builder
from ..graph.edit import producer, remove_dead, take_over
from ..graph.model import Model
from ..graph.narrow import Project, narrow, why_not_narrow
from ..graph.region import Leaf
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .blocks import Blocks
from .fitting.affine_map import put_map
from .fitting.damage import FEEDS, damage, per_error, why_blind
from .fitting.evidence import Evidence, Streams
from .fitting.kept_rows import KeptRows
from .fitting.less_work import Weights, why_no_less
from .fitting.measure import unmeasurable
from .fitting.moved import moved
from .fitting.neuron_fit import Features, NeuronFit, choose_ridge, keep_rows, refit
from .fitting.neuron_selection import Indices, Select, elimination, select_neurons
from .fitting.spread import Curve, allocate, widths_to_try
from .fitting.widths import Width, parse_widths

Array = npt.NDArray[Any]
_GREEDY_RIDGE = 1e-3
_UNMOVED = "slim-ffn: blocks whose neurons were to be moved, and why they were not"


@dataclass(frozen=True)
class SlimFFN(BlockPass):
    """Keep the most useful neurons of an FFN and fit them, on feeds, to do the work of all.

        y = h(x) W_down + b   →   ŷ = h_S(x) V + c            (affine=false)
                              →   ŷ = x A + h_S(x) V + c      (affine=true)

    ``keep`` is how many neurons stay: a number where it is 1 or more, a part of them where it is less; rounded up to a
    ``multiple`` that matrix kernels like. In gated blocks up and gate are cut together. ``select`` says which stay
    (see :mod:`neuron_selection`), ``refit`` what becomes of the down projection: ``ridge`` solves for V, A and c together,
    held near what the block had, λ chosen on tokens held out; ``bias`` only adds the mean of what is gone; ``none`` leaves all.

    With ``refit=ridge`` the neurons themselves are then moved by gradient descent on the block alone, ``refine`` times through
    its tokens, if that is better on tokens held out (see :mod:`refinement`).

    ``spread=sensitivity`` gives the blocks different widths under the same number of parameters: more to those whose errors
    reach the outputs (see :mod:`spread`). ``widths`` gives single blocks a width of their own, as ``ffnfold search`` does:
    ``384@0+2/0@5/96bare@1`` leaves 384 neurons in the blocks 0 and 2, in block 5 the affine map alone, as ``linearize-ffn`` puts
    it, and in block 1 96 neurons without such a map.

    Blocks are fitted in order of execution on what the rewritten blocks before them give, towards what the original model
    has there (``target=stream``: the original residual stream; ``target=block``: the block's own output). Tokens are
    weighted by the inverse of their size in front of the next norm (``weight=auto``). With ``select=greedy`` and ``refit=ridge``
    channels count by the gain of that norm where nothing else reads the sum (post-LN; see :mod:`read_metric`).

    Does not fire on packed experts, integer weights, blocks with a norm over their neurons or an activation fused into a
    projection, weights that the caller may override, blocks inside subgraphs (nothing can be measured there), or where there
    would be no fewer multiply-adds (all neurons would stay, or most and an affine map; something else reads them). Where weights
    stay in the file because something else reads them, so that it grows, a note says so.

    Source: docs/approximations.md; STAT, arXiv 2406.00061; GRAIL, arXiv 2602.23795; FLAP, arXiv 2312.11983; Wanda,
    arXiv 2306.11695.
    """

    name: ClassVar[str] = "slim-ffn"
    exact: ClassVar[bool] = False
    keep: float = field(default=0.5, metadata={"help": "how many neurons stay; below 1 a part of them"})
    affine: bool = field(default=True, metadata={"help": "an affine map of the input beside the neurons"})
    select: Select = field(default="greedy", metadata={"help": "which neurons stay"})
    refit: Literal["none", "bias", "ridge"] = field(default="ridge", metadata={"help": "what is fitted"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Literal["stream", "block"] = field(default="stream", metadata={"help": "what is fitted to"})
    refine: int = field(default=4, metadata={"help": "how often gradient descent goes through the tokens to move what stays"})
    vary: int = field(default=0, metadata={"help": "varied copies of each feed to fit on beside it"})
    held_out: Literal["each", "runs"] = field(default="each", metadata={
        "help": "what chooses the ridge: each fifth feed, or each fifth of 25 runs of neighbouring ones"})
    spread: Literal["uniform", "sensitivity"] = field(default="uniform", metadata={"help": "how widths differ over blocks"})
    multiple: int = field(default=32, metadata={"help": "widths are rounded up to a multiple of this"})
    widths: str = field(default="", metadata={"help": "neurons that stay in single blocks, e.g. 384@0+2/0@5/96bare@1"})

    def __post_init__(self) -> None:
        if self.vary < 0:
            raise ValueError(f"vary={self.vary}: copies cannot be fewer than none")
        if self.refine < 0:
            raise ValueError(f"refine={self.refine}: it cannot go through the tokens less than not at all")
        if not self.keep > 0 and not (self.keep == 0 and self.affine):
            raise ValueError(f"keep={self.keep} must be above 0: a number of neurons, or a part of them below 1 "
                             "(keep=0 goes with affine=true)")
        if self.keep >= 1 and self.keep != int(self.keep):
            raise ValueError(f"keep={self.keep}: a number of neurons must be whole")
        if self.multiple < 1:
            raise ValueError("multiple must be 1 or more")
        if self.affine and self.refit != "ridge":
            raise ValueError("affine=true needs refit=ridge")
        if self.spread == "sensitivity" and not self.needs_feeds:
            raise ValueError("spread=sensitivity needs feeds: choose another select or refit")
        if self.widths and self.spread == "sensitivity":
            raise ValueError("widths and spread=sensitivity both say how widths differ over blocks: give one of them")
        left_out = [index for index in parse_widths(self.widths) if index not in self.blocks]
        if left_out:
            raise ValueError(f"widths={self.widths} names block {left_out[0]}, which blocks={self.blocks} leaves out")
        if any(not each.neurons for each in parse_widths(self.widths).values()) and not self.affine:
            raise ValueError(f"widths={self.widths}: no neurons go with affine=true")

    @property
    def needs_feeds(self) -> bool:
        """Anything but the size of the weights has to be measured."""
        return self.select != "magnitude" or self.refit != "none"

    @property
    def asks_for(self) -> tuple[Blocks, ...]:
        """Those that ``widths`` names as well."""
        return (*super().asks_for, Blocks(tuple(sorted(parse_widths(self.widths)))))

    @property
    def _as_read(self) -> bool:
        return self.refit == "ridge" and self.select == "greedy"

    def width(self, block: FFNBlock) -> int:
        """Neurons that stay in ``block``."""
        own = parse_widths(self.widths).get(block.index)
        count = own.neurons if own is not None else self.keep if self.keep >= 1 else self.keep * block.d_ff
        return min(int(np.ceil(count / self.multiple - 1e-9)) * self.multiple, block.d_ff)

    def maps(self, block: FFNBlock) -> bool:
        """Whether ``block`` gets an affine map beside its neurons."""
        own = parse_widths(self.widths).get(block.index)
        return self.affine and not (own is not None and own.bare)

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be cut, or would be no less work."""
        reason = why_not_narrow(block) or why_no_less(block, self.width(block), self.maps(block))
        return None if reason is None else Refused(reason, block.output.name)

    def run(self, model: Model, context: Context) -> PassResult:
        """Fit and rewrite the blocks, each on what the ones before it give."""
        there, _ = context.ledger.select(self.blocks)
        weights = Weights(model, there)
        result = self._run(model, context)
        grown = weights.why_grown(there.keys() - {each.block for each in result.refused})
        return result if grown is None else dataclasses.replace(result, notes=(*result.notes, grown))

    def _run(self, model: Model, context: Context) -> PassResult:
        if not self.needs_feeds:
            return super().run(model, context)
        widths = self._spread(model, context) if self.spread == "sensitivity" else {}
        if isinstance(widths, Refused):
            return self.refuse_all(widths, context)
        context.memo[_UNMOVED] = {}
        with Streams(model, context, self.vary, runs=self.held_out == "runs") as streams:
            result = super().run(model, dataclasses.replace(context, streams=streams, widths=widths))
        left: dict[int, str] = context.memo.pop(_UNMOVED)
        notes = [f"the neurons of block {index} were not moved: {reason}" for index, reason in left.items() if reason]
        return dataclasses.replace(result, notes=tuple(notes))

    def _spread(self, model: Model, context: Context) -> dict[str, int] | Refused:
        """A width for each block that the feeds that choose run, by what its error does to the outputs."""
        assert context.choose is not None
        blind = why_blind(model, context.choose[:FEEDS], context)
        if blind is not None:
            return blind
        there, _ = context.ledger.select(self.blocks)
        there = {index: block for index, block in there.items()
                 if self.check(block) is None and unmeasurable(model, block) is None}
        curves = {}
        with Streams(model, context) as streams:
            for index, block in there.items():
                context.progress(f"{self.name}: how much block {index} matters")
                evidence = streams.evidence(block, inputs=self.affine, neurons=True, weight=self.weight, target="own",
                                            as_read=self._as_read)
                curve = self._curve(model, block, evidence, context) if evidence.rows else None
                if curve is not None:
                    curves[index] = curve
        budget = sum(self.width(there[index]) * curve.parameters for index, curve in curves.items())
        names = [there[index].output.name for index in curves]
        return dict(zip(names, allocate(list(curves.values()), budget), strict=True))

    def _curve(self, model: Model, block: FFNBlock, evidence: Evidence, context: Context) -> Curve | None:
        features = self._features(block, evidence)
        widths = widths_to_try(block.d_ff, self.multiple)
        lost = elimination(features, [*widths, self.width(block)], _GREEDY_RIDGE)
        fit = refit(features, lost[self.width(block)][0], _GREEDY_RIDGE, 0.0)
        fit = fit if evidence.metric is None else evidence.metric.out_of(fit)
        alone = dataclasses.replace(context, streams=None)
        harm = damage(model, block, lambda trial, same: self.rewrite(trial, same, fit, alone), context)
        if harm is None:
            return None
        scale = per_error(harm, lost[self.width(block)][1])
        leaves = len(block.region.leaves)
        return Curve(tuple(widths), tuple(scale * lost[width][1] for width in widths), leaves * block.d_model + block.d_out)

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """The fit."""
        if not self.needs_feeds:
            prior, bias = block.down.weight().astype(np.float64), block.down.bias()
            neurons = np.sort(np.argsort(-np.linalg.norm(prior, axis=1), kind="stable")[:self.width(block)])
            return NeuronFit(neurons, prior[neurons], None, np.zeros(block.d_out) if bias is None else bias, 0.0, np.nan)
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        assert context.streams is not None
        width = context.widths.get(block.output.name, self.width(block))
        reason = why_no_less(block, width, self.maps(block))
        if reason is not None:
            return Refused(reason, block.output.name)
        kind = self._kind(block, width)
        keep = KeptRows(context.streams.feeds) if self.refine and self.refit == "ridge" and width else None
        found = context.fits.load(block, kind) if context.fits is not None else None
        if found is not None and not self._later_fits_known(block, kind, context):
            context.streams.pass_by(block, inputs=self.maps(block) or keep is not None, neurons=width > 0, weight=self.weight,
                                    target=self.target)
        if found is None:
            evidence = context.streams.evidence(block, inputs=self.maps(block), neurons=width > 0, weight=self.weight,
                                                target=self.target, keep=keep, as_read=self._as_read)
            if not evidence.rows:
                return evidence.finite.why_none(block.input.name)
            found = self._fit(block, evidence, width)
            if keep is not None:
                found = self._refined(block, evidence, found, keep, context)
            found = found if evidence.metric is None else evidence.metric.out_of(found)
        if context.fits is not None:
            context.fits.save(block, kind, found)
        return found

    def _kind(self, block: FFNBlock, width: int) -> str:
        return str(Width(width, self.affine and not self.maps(block)))

    def _later_fits_known(self, block: FFNBlock, kind: str, context: Context) -> bool:
        """Whether no block after this one, whose fit is known, will have to be fitted."""
        assert context.fits is not None
        there = list(context.ledger.select(self.blocks)[0].values())
        later = there[[each.index for each in there].index(block.index) + 1:]
        widths = [context.widths.get(each.output.name, self.width(each)) for each in later]
        return context.fits.has(block, kind, [(each.index, self._kind(each, width))
                                              for each, width in zip(later, widths, strict=True)])

    def _refined(self, block: FFNBlock, evidence: Evidence, fit: NeuronFit, keep: KeptRows, context: Context) -> NeuronFit:
        """``fit`` with its neurons moved, where that helps; why not is kept for :meth:`run`."""
        fit, reason = moved(block, evidence, self._prior(block, evidence), fit, keep, self.refine, context,
                            f"{self.name}: block {block.index}")
        context.memo.setdefault(_UNMOVED, {})[block.index] = reason
        return fit

    def _features(self, block: FFNBlock, evidence: Evidence, neurons: bool = True) -> Features:
        return Features.of(evidence.everything(), self._prior(block, evidence, neurons), block.d_model if self.maps(block) else 0)

    def _prior(self, block: FFNBlock, evidence: Evidence, neurons: bool = True) -> Array:
        inputs = block.d_model if self.maps(block) else 0
        prior = np.concatenate([np.zeros((inputs, block.d_out)), *([block.down.weight().astype(np.float64)] if neurons else [])])
        return prior if evidence.metric is None else evidence.metric.into(prior)

    def survivors(self, block: FFNBlock, evidence: Evidence, widths: list[int]) -> dict[int, Indices]:
        """The neurons that stay at each of ``widths``, from one elimination."""
        found = elimination(self._features(block, evidence), widths, _GREEDY_RIDGE)
        return {width: found[width][0] for width in widths}

    def fit(self, block: FFNBlock, evidence: Evidence, width: int, neurons: Indices | None = None) -> NeuronFit:
        """The ``width`` neurons that stay, if it is not said which, and what they are refitted to.

        With none ``evidence`` may be of the inputs alone.
        """
        found = self._fit(block, evidence, width, neurons)
        return found if evidence.metric is None else evidence.metric.out_of(found)

    def _fit(self, block: FFNBlock, evidence: Evidence, width: int, neurons: Indices | None = None) -> NeuronFit:
        """The same in the metric of ``evidence``."""
        known = len(evidence.fit.widths or evidence.held_out.widths) > (2 if self.maps(block) else 1)
        everything = self._features(block, evidence, neurons=known)
        prior, inputs = everything.prior, everything.inputs
        if neurons is None:
            neurons = select_neurons(self.select, everything, width, _GREEDY_RIDGE) if width else np.zeros(0, np.int64)
        if self.refit != "ridge":
            bias = block.down.bias()
            return keep_rows(everything, neurons, correct_bias=self.refit == "bias",
                             bias=np.zeros(block.d_out) if bias is None else bias.astype(np.float64))
        halves = bool(evidence.fit.rows and evidence.held_out.rows)
        fit = Features.of(evidence.fit, prior, inputs) if halves else everything
        held_out = Features.of(evidence.held_out, prior, inputs) if halves else None
        ridge, error = choose_ridge(fit, held_out, neurons)
        return refit(everything, neurons, ridge, error)

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the narrow block in place."""
        fit = statistics
        assert isinstance(fit, NeuronFit)
        if fit.affine is not None and not len(fit.neurons):
            return put_map(model, block, fit.affine, fit.offset, context)
        build = Builder(model, block.graph, block.name, block.down.linear.onnx_type)
        parts = []
        if len(fit.neurons):
            hidden = narrow(model, block, fit.neurons, self._moved(model, block, fit))
            parts.append(build.linear(hidden, fit.matrix, None if fit.affine is not None else self._bias(block, fit),
                                      axis=block.axis, hint="slim_down"))
        if fit.affine is not None:
            parts.append(build.linear(block.input, fit.affine, fit.offset, axis=block.axis, hint="slim_affine"))
        output = parts[0] if len(parts) == 1 else build.op("Add", *parts, hint="slim_sum")
        old = producer(block.output)
        take_over(block.output, output)
        remove_dead(block.graph, [old] if old is not None else [])
        if context.streams is not None:
            context.streams.rewritten(block.output.name)
        return Rewritten()

    def _moved(self, model: Model, block: FFNBlock, fit: NeuronFit) -> Project | None:
        """Puts in the projections that were moved; None where they are what the block has."""
        if not fit.projections:
            return None
        of_leaf = {id(leaf): moved for leaf, moved in zip(block.region.leaves, fit.projections, strict=True)}

        def project(leaf: Leaf, weight: Array, bias: Array | None, hint: str) -> gs.Tensor:
            matrix, moved = of_leaf[id(leaf)]
            own = Builder(model, block.graph, block.name, leaf.linear.onnx_type)
            return own.linear(block.input, matrix, moved, axis=block.axis, hint=hint)

        return project

    def _bias(self, block: FFNBlock, fit: NeuronFit) -> Array | None:
        return fit.offset if fit.offset.any() or block.down.has_bias else None
