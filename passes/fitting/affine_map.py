"""One affine map, or two thin ones, in the place of a block.

    affine:  y ≈ x A + c                A, c = argmin Σ_t w_t ‖t_t − x_t A − c‖² + λ Σ_i var(x_i) ‖A_i‖²
    rank r:  y ≈ x U V + c              the same, among the maps of rank r:  U = A V_r, V = V_rᵀ,
                                        V_r the r leading eigenvectors of Aᵀ (Σ_xx + λD) A

The second is reduced-rank regression: among all maps of rank r this is the one with the smallest of the same sum of squares
(Izenman, "Reduced-rank regression for the multivariate linear model", 1975).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.block import OVERRIDABLE, FFNBlock
from ...graph.builder import Builder
from ...graph.edit import producer, remove_dead, take_over
from ...graph.model import Model
from ..base import Context, Refused, Rewritten
from .bypass import is_pure_branch
from .evidence import Evidence, Target
from .neuron_fit import Features, NeuronFit, choose_ridge, refit

Array = npt.NDArray[Any]


def why_no_map(block: FFNBlock) -> Refused | None:
    """Why no affine map can stand for ``block``, or None."""
    if block.experts != 1 or any(linear.gathered for linear in block.linears()):
        return Refused("its experts are packed in one weight", block.output.name)
    return Refused(OVERRIDABLE, block.output.name) if block.overridable else None


def input_evidence(block: FFNBlock, context: Context, *, weight: str, target: Target) -> Evidence | Refused:
    """Moments of x and of what the block should give, or why there are too few."""
    assert context.streams is not None
    evidence = context.streams.evidence(block, inputs=True, neurons=False, weight=weight, target=target)
    return evidence if evidence.rows else evidence.finite.why_none(block.input.name)


def fit_map(block: FFNBlock, evidence: Evidence) -> NeuronFit | Refused:
    """The affine map, λ chosen on tokens held out."""
    if evidence.rows < block.d_model:
        return Refused(f"{evidence.rows} tokens are too few for {block.d_model} inputs: give more feeds", block.input.name)
    nothing, none = np.zeros((block.d_model, block.d_out)), np.zeros(0, np.int64)
    everything = Features.of(evidence.everything(), nothing, block.d_model)
    halves = bool(evidence.fit.rows and evidence.held_out.rows)
    fit = Features.of(evidence.fit, nothing, block.d_model) if halves else everything
    held_out = Features.of(evidence.held_out, nothing, block.d_model) if halves else None
    return refit(everything, none, *choose_ridge(fit, held_out, none))


def reduce_rank(fit: NeuronFit, evidence: Evidence, rank: int) -> tuple[Array, Array, Array]:
    """U ``[d_model, rank]``, V ``[rank, d_out]`` and c ``[d_out]`` of the best map of rank ``rank``."""
    from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

    matrix = fit.affine
    assert matrix is not None
    inputs, outputs = matrix.shape
    features = Features.of(evidence.everything(), np.zeros((inputs, outputs)), inputs)
    penalty = fit.ridge * features.penalty(np.arange(inputs))
    explained = matrix.T @ (features.ff @ matrix + penalty[:, None] * matrix)
    _, leading = linalg.eigh(explained, subset_by_index=(outputs - rank, outputs - 1), check_finite=False)
    first, second = matrix @ leading, np.ascontiguousarray(leading.T)
    return first, second, features.mean_t - features.mean_f @ first @ second


def put_map(model: Model, block: FFNBlock, matrix: Array, offset: Array, context: Context) -> Rewritten:
    """``x A + c`` in the block's place; where x is also the residual, ``x (A + I) + c`` in that of the residual Add."""
    build = Builder(model, block.graph, block.name, block.onnx_type)
    join, target = block.join, block.output
    if join.direct and join.node.op == "Add" and join.residual is block.input and is_pure_branch(block):
        matrix, target = matrix + np.eye(len(matrix)), join.node.outputs[0]
    old = producer(target)
    take_over(target, build.linear(block.input, matrix, offset, axis=block.axis, hint="affine"))
    remove_dead(block.graph, [old] if old is not None else [])
    if context.streams is not None:
        context.streams.rewritten(target.name)
    return Rewritten(gone="made affine")


def put_thin_maps(model: Model, block: FFNBlock, factors: tuple[Array, Array], offset: Array, context: Context) -> Rewritten:
    """``x U V + c`` in the block's place."""
    build = Builder(model, block.graph, block.name, block.onnx_type)
    middle = build.linear(block.input, factors[0], None, axis=block.axis, hint="thin")
    block.replace(build.linear(middle, factors[1], offset, axis=block.axis, hint="thin_out"))
    if context.streams is not None:
        context.streams.rewritten(block.output.name)
    return Rewritten(gone="made affine")
