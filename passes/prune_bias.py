"""prune-bias: biases of FFN blocks taken out, what they did on average folded into a bias behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from ..graph.block import FFNBlock
from ..graph.edit import consumers, is_output
from ..graph.model import Model
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .exact.bias_places import BiasPlace, add_constant, inner_places, outer_place, take_away
from .exact.later_bias import LaterBias, later_bias, through_norm
from .fitting.bypass import is_pure_branch
from .fitting.measure import Finite, rows, unmeasurable
from .fitting.token_weights import token_weights

Array = npt.NDArray[Any]
_TOKENS = 4096
_TAKEN = "biases that prune-bias took out"


@dataclass(frozen=True)
class Cut:
    """What goes, and where what it did on average goes.

    Attributes:
        inner: biases in front of the activation. outer: the bias of the down projection, or None where it stays.
        shift: what is added to ``target``, ``[d]``; None for nothing.
    """

    inner: list[BiasPlace]
    outer: tuple[Any, int] | None
    shift: Array | None
    target: tuple[Any, int] | None


@dataclass(frozen=True)
class Sample:
    """Rows of what a block reads, gives, and joins, and their weights."""

    x: Array
    stream: Array
    weights: Array


@dataclass(frozen=True)
class PruneBias(BlockPass):
    """Remove biases of FFN blocks whose effect hardly varies, and fold its mean into a bias behind them.

        f(x) = σ(x W₁ + b₁) W₂ + b₂   →   σ(x W₁) W₂ + (b₂ + E[Δ]),   Δ = (σ(x W₁ + b₁) − σ(x W₁)) W₂
        norm(r + f + b₂), β           →   norm(r + f), β + E[norm(r + f + b₂) − norm(r + f)]
        r + f + b₂,  … + g + c        →   r + f,       … + g + (c + b₂)            g: what joins the stream next, with its bias c

    ``which`` says whether those in front of the activation (``up``, with gate), behind it (``down``) or both are candidates. One
    goes where what is left of its effect after the mean is at most ``below`` of the mean square of the residual stream (or of
    what the norm gives). The third line is exact where nothing reads the stream in between, as in parallel blocks; else what
    reads it misses b₂, which counts in full.

    Does not fire where there is no bias behind to take the mean, on a bias that may be overridden or lies inside an integer
    operator, on packed experts, a norm over the neurons, or (but for exact moves) inside subgraphs.

    Source: models trained without biases: T5 arXiv 1910.10683, PaLM arXiv 2204.02311, Cramming arXiv 2212.14034.
    """

    name: ClassVar[str] = "prune-bias"
    exact: ClassVar[bool] = False
    which: Literal["up", "down", "all"] = field(default="all", metadata={"help": "which biases are candidates"})
    below: float | None = field(default=0.001, metadata={"help": "part of the stream that may vary by it; none: any"})
    fold: bool = field(default=True, metadata={"help": "fold the mean of what goes into a bias behind it"})

    def __post_init__(self) -> None:
        if self.below is not None and not self.below >= 0:
            raise ValueError(f"below={self.below} must be 0 or more")

    @property
    def needs_feeds(self) -> bool:
        """Always: what a bias does is measured."""
        return True

    def check(self, block: FFNBlock) -> Refused | None:
        """What has no bias, or none that can be taken out."""
        if block.experts != 1 or any(linear.gathered for linear in block.linears()):
            return Refused("its experts are packed in one weight", block.output.name)
        if block.region.inner_norm:
            return Refused("its neurons are normed together", block.output.name)
        inner = inner_places(block) if self.which != "down" else []
        outer = outer_place(block) if self.which != "up" else None
        if not inner and outer is None:
            return Refused("it has no bias that could be taken out", block.output.name)
        return None

    def run(self, model: Model, context: Context) -> PassResult:
        """Take the biases out, block after block."""
        context.memo[_TAKEN] = []
        result = super().run(model, context)
        taken = context.memo.pop(_TAKEN)
        return PassResult(result.name, result.exact, result.fired, result.refused, notes=tuple(taken))

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """Which biases go, and what is folded where."""
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        sample = _sample(model, block, context)
        if isinstance(sample, Refused):
            return sample
        own, later = outer_place(block), later_bias(block)
        takes = own is not None or (later is not None and later.norm is None) or not self.fold
        inner: list[BiasPlace] = []
        shift, said = np.zeros(block.d_out), list[float]()
        if self.which != "down" and takes:
            for place in inner_places(block):
                _, varies = _effect(block, [place], sample)
                said.append(varies)
                if self._may_go(varies):
                    inner.append(place)
            shift, _ = _effect(block, inner, sample) if inner else (shift, 0.0)
        outer = None
        alone = len(consumers(block.output)) == 1 and not is_output(block.graph, block.output)
        if self.which != "up" and own is not None and later is not None and alone:
            outer, shift, varies = self._outer(block, own, later, shift, sample)
            said.append(varies)
        if not inner and outer is None:
            why = ("there is no bias behind it to take the mean" if not said or self.below is None
                   else f"its biases vary the stream by {min(said):.2g} of it or more, beyond {self.below:g}")
            return Refused(why, block.output.name)
        context.memo[_TAKEN].append(f"block {block.index}: {len(inner)} in front of the activation"
                                    + (", and that of the down projection" if outer is not None else ""))
        target = (own if outer is None else None) or ((later.node, later.index) if later is not None else None)
        return Cut(inner, outer, shift if self.fold and shift.any() else None, target)

    def _may_go(self, varies: float) -> bool:
        return self.below is None or varies <= self.below

    def _outer(self, block: FFNBlock, own: tuple[Any, int], later: LaterBias | None, shift: Array,
               sample: Sample) -> tuple[tuple[Any, int] | None, Array, float]:
        """Whether the bias of the down projection goes, what has to be added where it goes, and how much it varies the stream."""
        bias = block.down.bias()
        assert bias is not None
        constant = bias.astype(np.float64) + shift
        if later is not None and later.norm is not None:
            without = sample.stream - bias.astype(np.float64)
            there, gone = through_norm(later.norm, without, [constant, np.zeros_like(constant)])
            delta = there - gone
            mean = delta.mean(axis=0)
            varies = float(((delta - mean) ** 2).mean() / max(float((there ** 2).mean()), 1e-30))
            return (own, mean, varies) if self._may_go(varies) else (None, shift, varies)
        varies = 0.0 if later is not None and later.exact else float((constant ** 2).mean() * sample.weights.mean())
        return (own, constant, varies) if self._may_go(varies) else (None, shift, varies)

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Take them out."""
        cut = statistics
        assert isinstance(cut, Cut)
        if cut.shift is not None and cut.target is not None:
            add_constant(model, block.graph, *cut.target, cut.shift)
        if cut.outer is not None:
            take_away(block.graph, *cut.outer)
        for place in cut.inner:
            take_away(block.graph, place.node, place.index)
        return Rewritten()


def _sample(model: Model, block: FFNBlock, context: Context) -> Sample | Refused:
    """Up to 4096 rows, spread over the feeds, or why there are none."""
    assert context.fit is not None
    pure = is_pure_branch(block)
    wanted = [block.input, block.join.residual, block.join.branch] if pure else [block.input, block.output]
    each = max(1, -(-_TOKENS // len(context.fit)))
    found: list[list[Array]] = []
    finite = Finite()
    for values in rows(model, wanted, [block.axis] * len(wanted), context.fit, context):
        if len({len(value) for value in values}) > 1 or (pure and values[1].shape != values[2].shape):
            values = [values[0], values[-1]]
        with np.errstate(invalid="ignore"):  # rows that are not finite are left out
            stream = values[-1].astype(np.float64) + (values[1] if len(values) == 3 else 0)
        good = finite(stream, values[0])
        step = max(1, len(stream) // each)
        found.append([values[0][good][::step].astype(np.float64), stream[good][::step]])
        if sum(len(part[0]) for part in found) >= _TOKENS:
            break
    x, stream = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not len(x):
        return finite.why_none(block.input.name)
    return Sample(x, stream, token_weights(block, stream - stream.mean(axis=1, keepdims=True), [], "auto"))


def _effect(block: FFNBlock, places: list[BiasPlace], sample: Sample) -> tuple[Array, float]:
    """The weighted mean of what ``places`` do to the output, ``[d_out]``, and how much of the stream is left of it after that."""
    there, gone = [], []
    for number in range(len(block.region.leaves)):
        projection = block.gate if block.gate is not None and number == block.activation.gate else block.up
        bias = projection.bias()
        z = sample.x @ projection.weight().astype(np.float64) + (0 if bias is None else bias.astype(np.float64))
        there.append(z)
        gone.append(z - sum(place.parts.get(number, 0) for place in places))
    hidden = block.region.evaluate(there, biased=True) - block.region.evaluate(gone, biased=True)
    delta = hidden @ block.down.weight().astype(np.float64)
    part = sample.weights / sample.weights.sum()
    mean = part @ delta
    left = ((delta - mean) ** 2).mean(axis=1)
    return mean, float((left * sample.weights).mean())


