"""linearize-ffn: an FFN whose activation is a line, or the whole block as one affine map."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from ..graph.builder import Builder
from ..graph.edit import producer, remove_dead, take_over
from ..graph.ffn import FFNBlock
from ..graph.model import Model
from ..runtime import DiagonalMoments
from .affine_map import fit_map, input_evidence, put_map, why_no_map
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .evidence import Streams
from .measure import rows, unmeasurable
from .neuron_fit import NeuronFit
from .token_weights import token_weights, weight_values


@dataclass(frozen=True)
class LinearizeFFN(BlockPass):
    """Replace what an FFN computes by an affine function of its input, fitted on feeds.

        fit=affine:  y ≈ x A + c            A, c = argmin Σ_t w_t ‖t_t − x_t A − c‖² + λ Σ_i var(x_i) ‖A_i‖²
        fit=neuron:  σ(z_i) ≈ a_i z_i + c_i  for each neuron i, so that  y ≈ ((x W₁ + b₁) ∘ a + c) W₂ + b₂

    ``fit=affine`` emits the one matrix itself, ``[d_model, d_out]``, and works for gated blocks too. ``fit=neuron`` leaves
    the two MatMuls with constants between them, for ``fuse-matmul`` to multiply (TARDIS, arXiv 2501.10054); a gated block is
    refused, as linear × linear is quadratic. λ is chosen on tokens held out. Token t has the weight
    ``w_t = 1 / (mean of r_t² + 1e-3 · average)``, r what the block feeds: the normalized value behind it (the residual sum,
    centred, or the branch where that has a norm of its own); ``weight=none`` counts all tokens the same.

    Blocks are fitted in order of execution, each on what the rewritten blocks before it give, the affine map towards what the
    original model has there (``target=stream``: its residual stream; ``target=block``: the block's own output). Where x is
    also the residual (post-LN), the map takes the residual Add in: ``x + x A + c = x (A + I) + c``.

    Does not fire on blocks inside subgraphs (nothing can be measured there), on packed experts, or where the feeds bring
    fewer tokens than the block has inputs.

    Source: closed-form affine FFNs, arXiv 2606.19379; TARDIS, arXiv 2501.10054.
    """

    name: ClassVar[str] = "linearize-ffn"
    exact: ClassVar[bool] = False
    fit: Literal["affine", "neuron"] = field(default="affine", metadata={"help": "one map, or a line for each neuron"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Literal["stream", "block"] = field(default="stream", metadata={"help": "what an affine map is fitted to"})

    @property
    def needs_feeds(self) -> bool:
        """Always: it fits."""
        return True

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be fitted."""
        refusal = why_no_map(block)
        if refusal is not None:
            return refusal
        if self.fit == "neuron":
            if block.gated:
                return Refused("gated: linear times linear is not linear (fit=affine works)", block.output.name)
            if block.region.inner_norm:
                return Refused("a norm over the neurons ties them together (fit=affine works)", block.output.name)
            if any(leaf.linear.fused_activation for leaf in block.region.leaves):
                return Refused("the activation is fused into the projection (fit=affine works)", block.output.name)
        return None

    def run(self, model: Model, context: Context) -> PassResult:
        """Fit and rewrite the blocks, each on what the ones before it give."""
        if self.fit == "neuron":
            return super().run(model, context)
        with Streams(model, context) as streams:
            return super().run(model, dataclasses.replace(context, streams=streams))

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """The affine map, or a line for each neuron."""
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        if self.fit == "neuron":
            return self._lines(model, block, context)
        evidence = input_evidence(block, context, weight=self.weight, target=self.target)
        return evidence if isinstance(evidence, Refused) else fit_map(block, evidence)

    def _lines(self, model: Model, block: FFNBlock, context: Context) -> object:
        """Slope and intercept of each neuron, ``[d_ff]`` each, for z as the projection gives it."""
        leaf = block.region.leaves[0].tensor
        wanted = [leaf, block.hidden, block.output, *weight_values(block, self.weight)]
        axes = [block.up.linear.axis, block.down.linear.axis] + [block.axis] * (len(wanted) - 2)
        moments = DiagonalMoments()
        assert context.fit is not None
        for z, h, y, *others in rows(model, wanted, axes, context.fit, context):
            weights = token_weights(block, y, others, self.weight)
            good = np.isfinite(z).all(axis=1) & np.isfinite(h).all(axis=1) & np.isfinite(weights)
            if good.any():
                moments.update(z[good], h[good], weights[good])
        if not moments.rows:
            return Refused("no token of the feeds reached it", block.input.name)
        variance = moments.variance_z
        moving = variance > 1e-12 * (variance + moments.mean_z ** 2 + 1e-30)
        slope = np.where(moving, moments.covariance / np.where(moving, variance, 1), 0)
        return slope, moments.mean_h - slope * moments.mean_z

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the affine map, or the lines, in place."""
        if isinstance(statistics, NeuronFit):
            assert statistics.affine is not None
            return put_map(model, block, statistics.affine, statistics.offset, context)
        build = Builder(model, block.graph, block.name, block.onnx_type)
        assert isinstance(statistics, tuple)
        slope, intercept = statistics
        axis = block.up.linear.axis
        product = build.op("Mul", block.region.leaves[0].tensor, build.vector(slope, axis, "slope"), hint="line")
        line = build.op("Add", product, build.vector(intercept, axis, "intercept"), hint="line_shift")
        old = producer(block.hidden)
        take_over(block.hidden, line)
        remove_dead(block.graph, [old] if old is not None else [])
        return Rewritten(gone="made affine")
