"""linearize-ffn: an FFN whose activation is a line, or the whole block as one affine map."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy.typing as npt

from ..graph.block import FFNBlock
from ..graph.model import Model
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .fitting.affine_map import fit_map, input_evidence, put_map, why_no_map
from .fitting.damage import FEEDS, why_blind
from .fitting.evidence import Streams
from .fitting.frequent_range import LEVELS, Lines
from .fitting.heal import Healer
from .fitting.measure import unmeasurable
from .fitting.neuron_fit import NeuronFit
from .fitting.neuron_lines import choose_coverage, lines_everywhere, measure_curves, put_lines, why_no_lines
from .fitting.stein import fit_stein

Array = npt.NDArray[Any]
_HEALER = "what heals the blocks that stay"
_COVERAGE = "part of the tokens that the range of each neuron holds, by block"


@dataclass(frozen=True)
class LinearizeFFN(BlockPass):
    """Replace what an FFN computes by an affine function of its input, fitted on feeds.

        fit=affine:  y ≈ x A + c            A, c = argmin Σ_t w_t ‖t_t − x_t A − c‖² + λ Σ_i var(x_i) ‖A_i‖²
        fit=stein:   y ≈ x A + c            A = E[∂y/∂x] for Gaussian x, from the weights and the mean and covariance of x
        fit=neuron:  σ(z_i) ≈ a_i z_i + c_i  for each neuron i, so that  y ≈ ((x W₁ + b₁) ∘ a + c) W₂ + b₂

    ``fit=affine`` and ``fit=stein`` emit the one matrix itself, ``[d_model, d_out]``, and work for gated blocks too. For Gaussian
    inputs both are the same map (see :mod:`stein`); ``stein`` needs few tokens, ``affine`` more than the block has inputs,
    and is better where there are plenty. ``fit=neuron`` leaves the two MatMuls with constants between them, for
    ``fuse-matmul`` to multiply; a gated block is refused, as linear × linear is quadratic.

    With ``coverage`` below 1 a line is fitted to the range of its neuron that holds this part of the tokens and bends least
    (TARDIS, arXiv 2501.10054; see :mod:`frequent_range`); ``spread=sensitivity`` gives neurons and blocks different parts under
    the same mean, by what their errors do to the outputs. There is no predictor at run time: tokens outside get the line, too.

    λ is chosen on tokens held out. Token t has the weight ``w_t = 1 / (mean of r_t² + 1e-3 · average)``, r what the block feeds:
    the normalized value behind it (the residual sum, centred, or the branch where that has a norm of its own); ``weight=none``
    counts all tokens the same.

    Blocks are fitted in order of execution, each on what the rewritten blocks before it give, the maps towards what the
    original model has there (``target=stream``: its residual stream; ``target=block``: the block's own output). Where x is
    also the residual (post-LN), the map takes the residual Add in: ``x + x A + c = x (A + I) + c``.

    With ``heal`` the blocks that stay, behind the first that is made affine, make good what they can of its error: the numbers
    of their down projections are fitted anew, towards the original stream, and then their neurons moved by gradient descent on
    the block alone, ``refine`` times through its tokens, each where tokens held out say that it helps (see :mod:`heal`). Their
    shapes and their work stay.

    Does not fire on blocks inside subgraphs (nothing can be measured there), on packed experts, on weights that the caller may
    override, where the feeds bring fewer tokens than the block has inputs (``fit=affine``), or with ``spread=sensitivity`` where
    those that choose give nothing to compare.

    Source: closed-form affine FFNs, arXiv 2606.19379; Stein's lemma; TARDIS, arXiv 2501.10054.
    """

    name: ClassVar[str] = "linearize-ffn"
    exact: ClassVar[bool] = False
    whole: ClassVar[bool] = True
    fit: Literal["affine", "stein", "neuron"] = field(default="affine", metadata={
        "help": "one map, one map from few tokens, or a line for each neuron"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Literal["stream", "block"] = field(default="stream", metadata={"help": "what an affine map is fitted to"})
    vary: int = field(default=0, metadata={"help": "varied copies of each feed to fit on beside it"})
    heal: bool = field(default=True, metadata={"help": "fit other blocks anew, to undo errors of affine ones"})
    refine: int = field(default=4, metadata={
        "help": "how often gradient descent goes through the tokens to move the neurons of those blocks"})

    coverage: float = field(default=1.0, metadata={"help": "of fit=neuron: part of the tokens that a line is fitted to"})
    spread: Literal["uniform", "sensitivity"] = field(default="sensitivity", metadata={
        "help": "how coverage differs over blocks and neurons"})

    def __post_init__(self) -> None:
        if self.vary < 0:
            raise ValueError(f"vary={self.vary}: copies cannot be fewer than none")
        if self.refine < 0:
            raise ValueError(f"refine={self.refine}: it cannot go through the tokens less than not at all")
        if not LEVELS[0] <= self.coverage <= 1:
            raise ValueError(f"coverage={self.coverage} must be from {LEVELS[0]:g} to 1")
        if self.coverage != 1 and self.fit != "neuron":
            raise ValueError(f"coverage goes with fit=neuron, not with fit={self.fit}")

    @property
    def needs_feeds(self) -> bool:
        """Always: it fits."""
        return True

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be fitted."""
        refusal = why_no_map(block)
        if refusal is not None:
            return refusal
        if self.fit == "stein" and block.region.inner_norm:
            return Refused("a norm over the neurons ties them together (fit=affine works)", block.output.name)
        return why_no_lines(block) if self.fit == "neuron" else None

    def run(self, model: Model, context: Context) -> PassResult:
        """Fit and rewrite the blocks, each on what the ones before it give."""
        if self.fit == "neuron":
            parts = self._coverage(model, context) if self.coverage < 1 and self.spread == "sensitivity" else {}
            if isinstance(parts, Refused):
                return self.refuse_all(parts, context)
            return super().run(model, dataclasses.replace(context, memo={**context.memo, _COVERAGE: parts}))
        with Streams(model, context, self.vary) as streams:
            context = dataclasses.replace(context, streams=streams)
            if not self.heal or self.target == "block":
                return super().run(model, context)
            healer = Healer(model, context, self.blocks, self.weight, self.refine)
            result = super().run(model, dataclasses.replace(context, memo={**context.memo, _HEALER: healer}))
            healer.rest()
        if not healer.healed:
            return result
        return dataclasses.replace(result, notes=(*result.notes, *healer.notes()))

    def _coverage(self, model: Model, context: Context) -> dict[str, Array] | Refused:
        assert context.choose is not None
        blind = why_blind(model, context.choose[:FEEDS], context)
        if blind is not None:
            return blind
        there, _ = context.ledger.select(self.blocks)
        there = {index: block for index, block in there.items()
                 if self.check(block) is None and unmeasurable(model, block) is None}
        return choose_coverage(model, there, self.coverage, self.weight, context)

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """The affine map, or a line for each neuron."""
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        if self.fit == "neuron":
            return self._lines(model, block, context)
        healer = context.memo.get(_HEALER)
        if healer is not None:
            healer.before(block.index)
        evidence = input_evidence(block, context, weight=self.weight, target=self.target)
        if isinstance(evidence, Refused):
            return evidence
        return fit_map(block, evidence) if self.fit == "affine" else fit_stein(block, evidence)

    def _lines(self, model: Model, block: FFNBlock, context: Context) -> Lines | Refused:
        if self.coverage == 1:
            return lines_everywhere(model, block, self.weight, context)
        curves = measure_curves(model, block, self.weight, context)
        parts = context.memo.get(_COVERAGE, {}).get(block.output.name, self.coverage)
        return curves if isinstance(curves, Refused) else curves.lines(parts)

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the affine map, or the lines, in place."""
        if isinstance(statistics, NeuronFit):
            assert statistics.affine is not None
            if _HEALER in context.memo:
                context.memo[_HEALER].began = True
            return put_map(model, block, statistics.affine, statistics.offset, context)
        assert isinstance(statistics, Lines)
        return put_lines(model, block, statistics)
