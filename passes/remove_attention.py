"""remove-attention: drop attention sublayers and keep the residual path."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from ..graph.attention import Attention
from ..graph.builder import Builder
from ..graph.layers import Layer
from ..graph.model import Model
from .base import Context, Refused
from .fitting.bypass import Array, cut_out, stream_type
from .fitting.measure import RunningMean, rows, unmeasurable
from .fitting.scores import Cosine
from .removal import Removal


@dataclass(frozen=True)
class RemoveAttention(Removal):
    """Remove attention sublayers and keep the residual path.

        y = r + attention(x)   →   y = r                          keep=nothing
                               →   y = r + E[attention(x)]        keep=mean      (needs feeds)

    The sublayers are named by the FFN block behind them (``blocks``), or the ``count`` (or ``fraction``) of those that score
    lowest are chosen: ``by=cosine``, 1 − E[cos(r, r + a)] of the residual stream before and after the sublayer; ``by=output``,
    the relative error ‖o' − o‖/‖o‖ of the model's outputs when that one is removed. With what lies between the sublayer and the
    residual Add goes what it alone needs: projections, rotary embeddings, a norm that nothing else reads. In post-norm layers the
    norm behind the sum stays. A key-value cache that goes in and out of the graph goes in and out as before, and what computes it
    stays.

    Does not fire where no attention is found in front of a block, where a fused operator also gives out the cache (it would
    have to stay), and on attention over another stream (encoder to decoder) unless ``cross=true``.

    Source: LLM-Drop, arXiv 2406.15786; FinerCut, arXiv 2405.18218.
    """

    name: ClassVar[str] = "remove-attention"
    exact: ClassVar[bool] = False
    keep: Literal["nothing", "mean"] = field(default="mean", metadata={"help": "what stays of what it adds"})
    cross: bool = field(default=False, metadata={"help": "attention over another stream as well"})

    @property
    def needs_feeds(self) -> bool:
        """Anything but plain removal of given ones has to be measured."""
        return self.keep != "nothing" or super().needs_feeds

    def _which(self, layer: Layer) -> list[Attention]:
        return [each for each in layer.attention if self.cross or not each.crosses]

    def why_not(self, layer: Layer) -> Refused | None:
        """What stays."""
        which = self._which(layer)
        if not which:
            return Refused("its attention reads another stream (cross=true removes it)", layer.attention[0].output.name)
        return next((refusal for refusal in map(why_it_stays, which) if refusal is not None), None)

    def take_out(self, model: Model, layer: Layer, context: Context) -> Refused | None:
        """Take the branches out of the Adds that they go into."""
        which = self._which(layer)
        constants: list[Array | None] = []
        for each in which:
            constant = self._mean(model, each, context) if self.keep == "mean" else None
            if isinstance(constant, Refused):
                return constant
            constants.append(constant)
        for each, constant in zip(which, constants, strict=True):
            drop(model, each, constant)
            layer.settle()
        return None

    def _mean(self, model: Model, attention: Attention, context: Context) -> Array | Refused:
        refusal = unmeasurable(model, attention)
        if refusal is not None:
            return refusal
        assert context.fit is not None
        mean = RunningMean()
        for [added] in rows(model, [attention.join.branch], [attention.axis], context.fit, context):
            mean.update(added)
        return mean.mean if mean.rows else mean.finite.why_none(attention.output.name)

    def influence(self, model: Model, layer: Layer, context: Context) -> float:
        """The largest of 1 − E[cos(r, r + a)] over what would go."""
        return max(self._influence(model, each, context) for each in self._which(layer))

    def _influence(self, model: Model, attention: Attention, context: Context) -> float:
        if context.choose is None:
            return float("inf")
        cosine = Cosine()
        wanted = [attention.residual, attention.join.branch]
        for before, added in rows(model, wanted, [attention.axis] * 2, context.choose, context):
            if before.shape != added.shape:
                return float("inf")
            cosine.update(before.astype(np.float64), before.astype(np.float64) + added)
        return cosine.distance


def why_it_stays(attention: Attention) -> Refused | None:
    """Why ``attention`` cannot be taken out; None where it can."""
    if not attention.present:
        return Refused("its residual Add is gone", attention.output.name)
    if attention.join.node.op in ("Add", "Sum") and not_alike(attention.join.residual, attention.join.node.outputs[0]):
        return Refused("the residual alone has another shape or type than the sum", attention.join.residual.name)
    if attention.fused_cache:
        return Refused(f"{attention.core.op} also gives out keys and values that are read, so it would have to stay",
                       attention.core.outputs[1].name)
    return None


def drop(model: Model, attention: Attention, constant: Array | None) -> None:
    """Take ``attention`` out of the Add that it goes into, ``constant`` ``[d]`` in its place where there is one."""
    cut_out(Builder(model, attention.graph, attention.name, stream_type(attention)), attention, constant)


def not_alike(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Whether two values surely differ in type, rank or a fixed dimension."""
    if isinstance(a.dtype, int) and isinstance(b.dtype, int) and a.dtype != b.dtype:
        return True
    if a.shape is None or b.shape is None:
        return False
    fixed = ((x, y) for x, y in zip(a.shape, b.shape, strict=False) if isinstance(x, int) and isinstance(y, int))
    return len(a.shape) != len(b.shape) or any(x != y and 1 in (x, y) for x, y in fixed)
