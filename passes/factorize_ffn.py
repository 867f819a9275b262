"""factorize-ffn: two thin matrices in the place of each matrix of an FFN."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..graph.block import FFNBlock
from ..graph.linear import Linear
from ..graph.model import Model
from ..graph.types import numpy_type
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .fitting.damage import FEEDS, damage, per_error, why_blind
from .fitting.evidence import Streams, Target
from .fitting.linear_tasks import Linearwise, Task, put_matrices, why_not_apart
from .fitting.low_rank import Spectrum, spectrum
from .fitting.measure import unmeasurable
from .fitting.shrunk import OPSET, Factor, shrink
from .fitting.spread import Curve, allocate

Array = npt.NDArray[Any]
_STEPS = 16  # ranks looked at for each matrix


@dataclass(frozen=True)
class FactorizeFFN(BlockPass):
    """Put two thin matrices in the place of each matrix of an FFN.

        x W  →  (x U) V        U [d_in, r], V [r, d_out],   only where d_in · d_out > r (d_in + d_out)

    U V is the matrix of rank r that gives most nearly what W gives on the inputs that the feeds bring (the truncated SVD of
    the whitened matrix, see :mod:`low_rank`); with ``whiten=false`` it is the one nearest to W itself, and needs no feeds. Where
    there is a bias, it takes the mean of what is lost.

    With ``shrink=true`` r of the rows of U are made an identity, which is neither stored nor multiplied, wherever that stays well
    conditioned (see :mod:`shrunk`):

        (x U) V  =  (x_S + x_T U') V'        U' [d_in − r, r], V' [r, d_out]

    r is such that the part ``ratio`` of the numbers stays, or ``rank``, or the smallest that holds the part ``energy`` of the
    squared singular values. ``spread=sensitivity`` gives the matrices different ranks under the same number of parameters, more
    to those whose errors reach the outputs (see :mod:`spread`).

    Blocks are fitted in order of execution on what the rewritten blocks before them give. The down projection is solved for
    anew before it is cut, towards what the original model has there (``target=stream``, ``block``), so that it makes good what
    up and gate have lost; ``target=own`` takes its matrix as it is.

    Does not fire on packed experts, integer weights, an activation fused into a projection, weights that the caller may
    override or that something else reads, or, with ``whiten=true``, on blocks inside subgraphs; with ``spread=sensitivity`` not
    where the feeds that choose give nothing to compare.

    Source: SVD-LLM, arXiv 2403.07378; reduced-rank regression, Izenman 1975; MatShrink (doc/matShrink.pdf of
    github.com/OpenMachine-ai/transformer-tricks).
    """

    name: ClassVar[str] = "factorize-ffn"
    exact: ClassVar[bool] = False
    ratio: float = field(default=0.5, metadata={"help": "part of the numbers of each matrix that stays"})
    rank: int | None = field(default=None, metadata={"help": "of every matrix, in the place of ratio"})
    energy: float | None = field(default=None, metadata={
        "help": "part of the squared singular values that stays, in the place of ratio"})
    whiten: bool = field(default=True, metadata={"help": "by the inputs of the feeds; false: plain SVD, without feeds"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Target = field(default="stream", metadata={"help": "what the down projection is fitted to"})
    spread: Literal["uniform", "sensitivity"] = field(default="uniform", metadata={"help": "how ranks differ over matrices"})
    shrink: bool = field(default=False, metadata={"help": "leave out r² numbers that can be an identity"})

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must lie between 0 and 1")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} must be 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy={self.energy} must lie between 0 and 1")
        if self.rank is not None and self.energy is not None:
            raise ValueError("rank and energy both say how much stays: give one of them")
        if self.spread == "sensitivity" and (self.energy is not None or not self.whiten):
            raise ValueError("spread=sensitivity goes with ratio or rank, and with whiten=true")

    @property
    def needs_feeds(self) -> bool:
        """Whitening measures the inputs."""
        return self.whiten

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be replaced, or would not get smaller."""
        refusal = why_not_apart(block)
        linears = block.linears()
        if refusal is None and self.energy is None and not any(self._gains(linear, self._rank(linear)) for linear in linears):
            ranks = "+".join(str(self._rank(linear)) for linear in linears)
            return Refused(f"at rank {ranks} nothing would get smaller", block.output.name)
        return refusal

    def run(self, model: Model, context: Context) -> PassResult:
        """Factorize the blocks, each on what the ones before it give."""
        if not self.whiten:
            return super().run(model, context)
        ranks = self._spread(model, context) if self.spread == "sensitivity" else {}
        if isinstance(ranks, Refused):
            return self.refuse_all(ranks, context)
        with Streams(model, context) as streams:
            return super().run(model, dataclasses.replace(context, streams=streams, widths=ranks))

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the thin matrices in place."""
        def compress(task: Task) -> tuple[Factor, Array] | None:
            found = spectrum(task.wanted, task.gram)
            width = context.widths.get(task.linear.output.name)
            shrinks = self.shrink and model.opset >= OPSET and task.linear.axis == -1
            return (self._shrunk(task.linear, found, width) if shrinks else None) or self._thin(task.linear, found, width)

        refusal = self._linearwise(model, context).replace(block, compress)
        return refusal or Rewritten(gone="factorized")

    def _linearwise(self, model: Model, context: Context) -> Linearwise:
        there, _ = context.ledger.select(self.blocks)
        return Linearwise(model, context, self, list(there.values()), self.whiten, self.weight, self.target)

    def _gains(self, linear: Linear, rank: int) -> bool:
        return _smaller(linear, rank) or (self.shrink and rank < min(linear.d_in, linear.d_out))

    def _thin(self, linear: Linear, found: Spectrum, width: int | None) -> tuple[Array, Array] | None:
        """U and V, where they are smaller than W."""
        rank = width or (self._rank(linear) if self.energy is None else found.rank_for(self.energy))
        return found.factors(rank) if _smaller(linear, rank) else None

    def _shrunk(self, linear: Linear, found: Spectrum, width: int | None) -> tuple[Factor, Array] | None:
        """U' and V', where they are smaller than W and well conditioned. At the same ``ratio`` r is larger than without."""
        rank = width or (self._rank(linear, shrunk=True) if self.energy is None else found.rank_for(self.energy))
        if rank >= min(linear.d_in, linear.d_out):
            return None
        return shrink(*found.factors(rank), float(ml_dtypes.finfo(numpy_type(linear.onnx_type)).eps))

    def _rank(self, linear: Linear, shrunk: bool = False) -> int:
        """Of ``linear``, where all keep the same part."""
        if self.rank is not None:
            return min(self.rank, linear.d_in, linear.d_out)
        if shrunk:  # r (d_in + d_out) − r² = ratio · d_in · d_out
            half = (linear.d_in + linear.d_out) / 2
            return max(1, int(half - math.sqrt(half ** 2 - self.ratio * linear.d_in * linear.d_out)))
        return max(1, int(self.ratio * linear.d_in * linear.d_out / (linear.d_in + linear.d_out)))

    def _spread(self, model: Model, context: Context) -> dict[str, int] | Refused:
        """A rank for each linear, by the name of its output: an error of a block counts by what it does to the outputs.

        Blocks that the feeds that choose never run have none.
        """
        assert context.choose is not None
        blind = why_blind(model, context.choose[:FEEDS], context)
        if blind is not None:
            return blind
        there, _ = context.ledger.select(self.blocks)
        there = {index: block for index, block in there.items()
                 if self.check(block) is None and unmeasurable(model, block) is None}
        curves: dict[str, Curve] = {}
        budget = 0
        with Streams(model, context) as streams:
            linears = dataclasses.replace(self._linearwise(model, dataclasses.replace(context, streams=streams)), target="own")
            for index, block in there.items():
                context.progress(f"{self.name}: how much block {index} matters")
                tasks = {task.linear.output.name: task for task in linears.tasks(block)}
                spectra = {name: spectrum(task.wanted, task.gram) for name, task in tasks.items()}
                ranks = {name: self._rank(task.linear) for name, task in tasks.items()}
                harm = damage(model, block, _cutting(tasks, spectra, ranks), context)
                if harm is None:
                    continue
                harm = per_error(harm, sum(spectra[name].lost(rank) for name, rank in ranks.items()))
                for name, task in tasks.items():
                    curves[name] = _curve(task.linear, spectra[name], ranks[name], harm)
                    budget += ranks[name] * curves[name].parameters
        return dict(zip(curves, allocate(list(curves.values()), budget), strict=True))


def _smaller(linear: Linear, rank: int) -> bool:
    return linear.d_in * linear.d_out > rank * (linear.d_in + linear.d_out)


def _cutting(tasks: dict[str, Task], spectra: dict[str, Spectrum], ranks: dict[str, int]) -> Callable[[Model, FFNBlock], None]:
    """What cuts the same block of a copy of the model."""
    def cut(model: Model, block: FFNBlock) -> None:
        for linear in block.linears():
            name = linear.output.name
            if name in tasks and _smaller(linear, ranks[name]):
                factors = spectra[name].factors(ranks[name])
                put_matrices(model, block, linear, factors, tasks[name].bias_of(factors[0] @ factors[1]))

    return cut


def _curve(linear: Linear, found: Spectrum, rank: int, harm: float) -> Curve:
    parameters = linear.d_in + linear.d_out
    most = max(1, (linear.d_in * linear.d_out - 1) // parameters)  # one more and nothing gets smaller
    ranks = sorted({*np.linspace(max(1, most // _STEPS), most, _STEPS).astype(int).tolist(), min(rank, most)})
    return Curve(tuple(ranks), tuple(harm * found.lost(each) for each in ranks), parameters)
