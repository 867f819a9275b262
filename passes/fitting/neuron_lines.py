"""A line in the place of the activation of each neuron: measured on feeds, and put in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock
from ...graph.builder import Builder
from ...graph.edit import producer, remove_dead, take_over
from ...graph.model import Model
from ...runtime import DiagonalMoments
from ..base import Context, Refused, Rewritten
from .damage import damage, per_error
from .frequent_range import Curves, Lines, spread_coverage
from .measure import Finite, rows
from .token_weights import token_weights, weight_values

Array = npt.NDArray[Any]
_ENOUGH = 16_384  # tokens that the parts are chosen on


def why_no_lines(block: FFNBlock) -> Refused | None:
    """Why the neurons of ``block`` cannot have lines, or None."""
    reason = None
    if block.gated:
        reason = "gated: linear times linear is not linear (fit=affine works)"
    elif block.region.inner_norm:
        reason = "a norm over the neurons ties them together (fit=affine works)"
    elif any(leaf.linear.fused_activation for leaf in block.region.leaves):
        reason = "the activation is fused into the projection (fit=affine works)"
    return None if reason is None else Refused(reason, block.output.name)


def lines_everywhere(model: Model, block: FFNBlock, weight: str, context: Context) -> Lines | Refused:
    """The least-squares line of each neuron over all tokens, for z as the projection gives it."""
    moments, finite = DiagonalMoments(), Finite()
    for z, h, weights in _tokens(model, block, weight, finite, context):
        moments.update(z, h, weights)
    if not moments.rows:
        return finite.why_none(block.input.name)
    variance = moments.variance_z
    moving = variance > 1e-12 * (variance + moments.mean_z ** 2 + 1e-30)
    slope = np.where(moving, moments.covariance / np.where(moving, variance, 1), 0)
    return Lines(slope, moments.mean_h - slope * moments.mean_z, moments.variance_h - slope * moments.covariance)


def measure_curves(model: Model, block: FFNBlock, weight: str, context: Context, tokens: int | None = None) -> Curves | Refused:
    """How each neuron answers to each range of z, from ``tokens`` tokens or somewhat more (None: from all)."""
    curves, finite = Curves(), Finite()
    for z, h, weights in _tokens(model, block, weight, finite, context):
        curves.update(z, h, weights)
        if tokens is not None and curves.rows >= tokens:
            break
    return curves if curves.rows else finite.why_none(block.input.name)


def choose_coverage(model: Model, blocks: Mapping[int, FFNBlock], coverage: float, weight: str,
                    context: Context) -> dict[str, Array]:
    """For each block, by the name of its output, the part of the tokens that the range of each neuron is to hold.

    Blocks that the feeds that choose never run have none.

    An error of neuron i in block b costs s_b ‖w_i‖²: w_i its row of the down projection, s_b what the outputs of the model move
    by when this block alone gets lines (on feeds that choose), over the error of those lines.
    """
    errors = {}
    for index, block in blocks.items():
        context.progress(f"linearize-ffn: how much block {index} matters")
        curves = measure_curves(model, block, weight, context, _ENOUGH)
        if isinstance(curves, Refused):
            continue
        size = (block.down.weight().astype(np.float64) ** 2).sum(axis=1)
        lines = curves.lines(coverage)
        moved = damage(model, block, _putting(lines), context)
        if moved is not None:
            errors[block.output.name] = per_error(moved, float(size @ lines.error)) * size[:, None] * curves.errors()
    if not errors:
        return {}
    return dict(zip(errors, spread_coverage(list(errors.values()), coverage), strict=True))


def put_lines(model: Model, block: FFNBlock, lines: Lines) -> Rewritten:
    """``z ∘ slope + intercept`` in the place of the activation; the two projections stay."""
    build = Builder(model, block.graph, block.name, block.onnx_type)
    axis = block.up.linear.axis
    product = build.op("Mul", block.region.leaves[0].tensor, build.vector(lines.slope, axis, "slope"), hint="line")
    line = build.op("Add", product, build.vector(lines.intercept, axis, "intercept"), hint="line_shift")
    old = producer(block.hidden)
    take_over(block.hidden, line)
    remove_dead(block.graph, [old] if old is not None else [])
    return Rewritten(gone="made affine")


def _putting(lines: Lines) -> Any:
    return lambda trial, same: put_lines(trial, same, lines)


def _tokens(model: Model, block: FFNBlock, weight: str, finite: Finite,
            context: Context) -> Iterator[tuple[Array, Array, Array]]:
    """For each feed z and h ``[rows, d_ff]`` and the weights of the rows, those left out that are not finite."""
    wanted = [block.region.leaves[0].tensor, block.hidden, block.output, *weight_values(block, weight)]
    axes = [block.up.linear.axis, block.down.linear.axis] + [block.axis] * (len(wanted) - 2)
    assert context.fit is not None
    for z, h, y, *others in rows(model, wanted, axes, context.fit, context):
        weights = token_weights(block, y, others, weight)
        good = finite(z, h, weights)
        if good.any():
            yield z[good], h[good], weights[good]
