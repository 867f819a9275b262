"""remove-layer: drop whole layers, attention and FFN together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..graph.builder import Builder
from ..graph.edit import producer, remove_dead, substitute
from ..graph.layers import Layer
from ..graph.model import Model
from .base import Context, Refused
from .fitting.bypass import bypass, splice, stream_type
from .fitting.measure import rows
from .fitting.scores import Cosine
from .removal import Removal
from .remove_attention import drop, not_alike, why_it_stays


@dataclass(frozen=True)
class RemoveLayer(Removal):
    """Remove whole layers: what goes in comes out.

        r' = r + attention(norm r),  y = r' + f(norm r')    →   y = r      pre-norm, and sandwich
        r' = norm(r + attention r),  y = norm(r' + f(r'))   →   y = r      post-norm: both norms go too

    Layers are named by the FFN block in them (``blocks``), or the ``count`` (or ``fraction``) of those that score lowest are
    chosen: ``by=cosine``, block influence 1 − E[cos(r, y)]; ``by=output``, the relative error ‖o' − o‖/‖o‖ of the model's outputs
    when that one layer is removed. Attention over another stream that lies in the layer goes with it, and so do all experts.
    A key-value cache that goes in and out of the graph goes in and out as before, and what computes it stays.

    Does not fire on a block with no attention in front of it, and where a fused operator also gives out the cache.

    Source: ShortGPT, arXiv 2403.03853; LLM-Drop, arXiv 2406.15786.
    """

    name: ClassVar[str] = "remove-layer"
    exact: ClassVar[bool] = False
    gone: ClassVar[bool] = True

    def why_not(self, layer: Layer) -> Refused | None:
        """What stays."""
        block = layer.block
        if all(block.join.node is not node for node in block.graph.nodes):
            return Refused("it joins the stream of another graph", block.output.name)
        if layer.end is not None and not_alike(layer.start, layer.end):
            return Refused("what goes into the layer has another shape or type than what comes out", layer.start.name)
        join = block.join
        if layer.end is None and join.node.op in ("Add", "Sum") and not_alike(join.residual, join.node.outputs[0]):
            return Refused("the residual alone has another shape or type than the sum", join.residual.name)
        return next((refusal for refusal in map(why_it_stays, layer.attention) if refusal is not None), None)

    def take_out(self, model: Model, layer: Layer, context: Context) -> Refused | None:
        """Take both branches out, or in post-norm layers put what goes in in the place of what comes out."""
        block = layer.block
        if all(block.join.node is not node for node in block.graph.nodes):
            return Refused("its layer is gone already, with another expert", block.output.name)
        if layer.end is not None:
            last = producer(layer.end)
            substitute(block.graph, layer.end, layer.start)
            remove_dead(block.graph, [last] if last is not None else [])
        else:
            for each in layer.attention:
                drop(model, each, None)
                layer.settle()
            if not splice(Builder(model, block.graph, block.name, stream_type(block)), block, None):
                bypass(model, block, None)
        return None

    def influence(self, model: Model, layer: Layer, context: Context) -> float:
        """Block influence of the layer."""
        if context.choose is None:
            return float("inf")
        join, axis = layer.block.join, layer.block.axis
        ends = [layer.end] if layer.end is not None else [join.residual, join.branch]
        cosine = Cosine()
        for before, *after in rows(model, [layer.start, *ends], [axis] * (1 + len(ends)), context.choose, context):
            if any(each.shape != before.shape for each in after):
                return float("inf")
            cosine.update(before.astype(np.float64), np.sum([each.astype(np.float64) for each in after], axis=0))
        return cosine.distance
