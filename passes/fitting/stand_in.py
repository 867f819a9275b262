"""What may stand in the place of a block that is taken out, from the cheapest to the dearest.

    nothing   y = r                              r the residual that the block is added to, f what it adds, x its input
    mean      y = r + E[f]
    scale     y = s r,  s = E[‖r + f‖ / ‖r‖]
    rank      y = r + x U V + c                  U [d, k], V [k, d]
    affine    y = r + x A + c
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock
from ...graph.model import Model
from ..base import Context, Refused, Rewritten
from .affine_map import fit_map, input_evidence, put_map, put_thin_maps, reduce_rank, why_no_map
from .bypass import bypass, is_pure_branch, measured_value, rescale
from .evidence import Evidence
from .measure import RunningMean, rows, unmeasurable
from .neuron_fit import NeuronFit

Array = npt.NDArray[Any]
Rung = Literal["nothing", "mean", "scale", "rank", "affine"]
RUNGS: tuple[Rung, ...] = ("nothing", "mean", "scale", "rank", "affine")
FITTED = frozenset({"rank", "affine"})  # on moments of the block's input


@dataclass(frozen=True)
class StandIn:
    """What takes a block's place, with its numbers.

    Attributes:
        constant: ``[d]``, the mean, or what the maps add.
        scale: of the residual.
        maps: A, or U and V.
    """

    rung: Rung
    constant: Array | None = None
    scale: float = 1.0
    maps: tuple[Array, ...] = ()

    def put(self, model: Model, block: FFNBlock, context: Context) -> Rewritten:
        """Take ``block`` out of ``model`` and put this in its place."""
        if self.rung == "scale":
            rescale(model, block, self.scale)
        elif not self.maps:
            bypass(model, block, self.constant)
        elif len(self.maps) == 1:
            assert self.constant is not None
            return put_map(model, block, self.maps[0], self.constant, context)
        else:
            assert self.constant is not None
            return put_thin_maps(model, block, (self.maps[0], self.maps[1]), self.constant, context)
        if context.streams is not None:
            context.streams.rewritten(block.output.name)
        return Rewritten(gone="removed")


@dataclass
class Measured:
    """What may stand for one block, measured on the model as it is rewritten so far. What two need is measured once."""

    model: Model
    block: FFNBlock
    context: Context
    rank: int

    def stand_in(self, rung: Rung) -> StandIn | Refused:
        """The stand-in of a kind, or why there is none."""
        if rung == "nothing":
            return StandIn(rung)
        refusal = unmeasurable(self.model, self.block)
        if refusal is not None:
            return refusal
        return {"mean": self._mean, "scale": self._scale, "rank": self._rank, "affine": self._affine}[rung]()

    def _mean(self) -> StandIn | Refused:
        return self._moved[0]

    def _scale(self) -> StandIn | Refused:
        if not is_pure_branch(self.block):
            return Refused("its branch into the residual Add carries something else too (keep=mean works)",
                           self.block.join.branch.name)
        return self._moved[1]

    @cached_property
    def _moved(self) -> tuple[StandIn | Refused, StandIn | Refused]:
        """The mean of what the block adds, and how it changes the size of the residual: one pass over the feeds."""
        block, join = self.block, self.block.join
        wanted = [measured_value(block), *([join.residual] if is_pure_branch(block) else [])]
        assert self.context.fit is not None
        mean, ratios = RunningMean(), RunningMean()
        alike = True
        for added, *others in rows(self.model, wanted, [block.axis] * len(wanted), self.context.fit, self.context):
            mean.update(added)
            alike = alike and all(before.shape == added.shape for before in others)
            if others and alike:
                before = others[0].astype(np.float64)
                sizes = np.linalg.norm(before, axis=1)
                there = sizes > 0
                with np.errstate(invalid="ignore"):  # rows that are not finite do not count
                    ratios.update(np.linalg.norm((before + added)[there], axis=1, keepdims=True) / sizes[there, None])
        none = mean.finite.why_none(block.output.name)
        scale: StandIn | Refused = StandIn("scale", scale=float(ratios.mean[0])) if ratios.rows else none
        if not alike:
            scale = Refused("the residual has another shape than what is added to it", join.residual.name)
        return StandIn("mean", mean.mean) if mean.rows else none, scale

    def _rank(self) -> StandIn | Refused:
        inputs, outputs = self.block.d_model, self.block.d_out
        if self.rank * (inputs + outputs) >= inputs * outputs:
            return Refused(f"two maps of rank {self.rank} cost as much as one of {inputs}×{outputs} (keep=affine)",
                           self.block.output.name)
        fit = self._fit
        if isinstance(fit, Refused):
            return fit
        assert isinstance(self._evidence, Evidence)
        first, second, offset = reduce_rank(fit, self._evidence, self.rank)
        return StandIn("rank", offset, maps=(first, second))

    def _affine(self) -> StandIn | Refused:
        fit = self._fit
        if isinstance(fit, Refused):
            return fit
        assert fit.affine is not None
        return StandIn("affine", fit.offset, maps=(fit.affine,))

    @cached_property
    def _evidence(self) -> Evidence | Refused:
        refusal = why_no_map(self.block)
        return refusal or input_evidence(self.block, self.context, weight="auto", target="stream")

    @cached_property
    def _fit(self) -> NeuronFit | Refused:
        return self._evidence if isinstance(self._evidence, Refused) else fit_map(self.block, self._evidence)
