"""bilinear-ffn: FFN blocks without their activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from ..graph.block import FFNBlock, Projection
from ..graph.builder import Builder
from ..graph.model import Model
from ..graph.narrow import why_not_narrow
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .fitting.evidence import Streams, Target
from .fitting.linear_tasks import change_hidden, fitted_task
from .fitting.measure import Finite, unmeasurable

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Line:
    """``act(g_i) ≈ slope_i g_i + intercept_i``, ``[d_ff]`` each."""

    slope: Array
    intercept: Array


@dataclass(frozen=True)
class BilinearFFN(BlockPass):
    """Put a line in the place of the activation of each neuron, folded into the projection before it.

        gated    h = act(g) ∘ u  →  (g ∘ a + c) ∘ u     y = ((x W_gate diag(a) + b') ∘ (x W_up + b)) W_down
        ungated  h = act(z)      →   z ∘ a + c          y is a product of two matrices: ``fuse-matmul`` makes them one, or
                                                        leaves them thin where d_ff < d_model / 2

        a_i, c_i = argmin Σ_t w_t (h_ti − (a g_ti + c) u_ti)²        (u = 1 where there is no gate)

    The down projection is then solved for anew (``refit=ridge``), held near what it was, towards what the original model has
    there (``target``), or stays (``refit=none``). Blocks are fitted in order of execution on what the rewritten blocks before
    them give.

    Does not fire on packed experts, integer weights, weights that the caller may override, blocks with a norm over their neurons
    or an activation fused into a projection, blocks inside subgraphs, or where there is no activation.

    Source: bilinear layers, arXiv 2002.05202; a line for each neuron, TARDIS, arXiv 2501.10054.
    """

    name: ClassVar[str] = "bilinear-ffn"
    exact: ClassVar[bool] = False
    refit: Literal["ridge", "none"] = field(default="ridge", metadata={"help": "of the down projection"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Target = field(default="stream", metadata={"help": "what the down projection is fitted to"})

    @property
    def needs_feeds(self) -> bool:
        """Always: it fits."""
        return True

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be fitted."""
        reason = why_not_narrow(block)
        if reason is None and block.activation.name == "identity":
            reason = "it has no activation"
        return None if reason is None else Refused(reason, block.output.name)

    def run(self, model: Model, context: Context) -> PassResult:
        """Fit and rewrite the blocks, each on what the ones before it give."""
        with Streams(model, context) as streams:
            return super().run(model, dataclasses.replace(context, streams=streams))

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> Line | Refused:
        """The line of each neuron."""
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        sums = np.zeros((5, block.d_ff))
        finite = Finite()
        for g, u, h, w in self._tokens(block, finite, context):
            gu = g * u
            sums += np.stack([w @ (gu * gu), w @ (gu * u), w @ (u * u), w @ (gu * h), w @ (u * h)])
        if not sums[2].any():
            return finite.why_none(block.input.name)
        return _solve(sums)

    def _tokens(self, block: FFNBlock, finite: Finite, context: Context) -> Iterator[tuple[Array, Array, Array, Array]]:
        """For each feed g, u and h ``[rows, d_ff]`` and the weights of the rows, in float64."""
        assert context.streams is not None
        under, beside = _weights(block.gate or block.up), _weights(block.up)
        axes = [block.axis, block.down.linear.axis]
        for (x, h), weights in context.streams.tokens(block, [block.input, block.hidden], axes, self.weight, finite):
            g = x @ under[0] + under[1]
            u = x @ beside[0] + beside[1] if block.gated else np.ones_like(g)
            yield g.astype(np.float64), u.astype(np.float64), h.astype(np.float64), weights.astype(np.float64)

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the lines in place and fit the down projection."""
        line = statistics
        assert isinstance(line, Line)
        assert context.streams is not None
        build = Builder(model, block.graph, block.name, block.onnx_type)
        under, beside = _weights(block.gate or block.up), _weights(block.up)
        value = build.linear(block.input, under[0] * line.slope, under[1] * line.slope + line.intercept, axis=block.axis,
                             hint="gate" if block.gated else "up")
        if block.gated:
            up = build.linear(block.input, beside[0], beside[1] if block.up.has_bias else None, axis=block.axis, hint="up")
            value = build.op("Mul", value, up, hint="bilinear")
        prior = block.down.weight().astype(np.float64)
        change_hidden(model, block, value, prior, context)
        if self.refit == "ridge":
            evidence = context.streams.evidence(block, inputs=False, neurons=True, weight=self.weight, target=self.target)
            if evidence.rows:
                task = fitted_task(block, prior, evidence, block.down.has_bias)
                block.replace(build.linear(block.hidden, task.wanted, task.bias, axis=block.axis, hint="down"))
        context.streams.rewritten(block.output.name)
        return Rewritten(gone=None if block.gated else "made affine")


def _weights(projection: Projection) -> tuple[Array, Array]:
    """Matrix and bias (zeros where there is none), float32."""
    bias = projection.bias()
    return projection.weight().astype(np.float32), (np.zeros(projection.d_out) if bias is None else bias).astype(np.float32)


def _solve(sums: Array) -> Line:
    """Two unknowns for each neuron, from Σ w (gu)², w gu·u, w u², w gu·h, w u·h; a constant where g never moves."""
    gg, gu, uu, gh, uh = sums
    determinant = gg * uu - gu * gu
    moves = determinant > 1e-9 * gg * uu
    safe = np.where(moves, determinant, 1)
    slope = np.where(moves, (gh * uu - uh * gu) / safe, 0)
    level = np.where(uu > 0, uu, 1)
    return Line(slope, np.where(uu > 0, (uh - slope * gu) / level, 0))
