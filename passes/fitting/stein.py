"""The affine map of a block for Gaussian inputs, in closed form from its weights and the mean and covariance of x.

For x ~ N(μ, Σ) the least-squares map of any f is E[∂f/∂x] (Stein's lemma: Cov(x, f(x)) = Σ E[∂f/∂x]). With z = x W₁ + b₁,
h = σ(z) or σ(g) ∘ u, and W₂ the down projection, that is

    ungated   A = W₁ diag(E[σ'(z_i)]) W₂                                    z_i ~ N(μ_i, s_i²)
    gated     A = (W_g diag(E[∂h_i/∂g_i]) + W_u diag(E[∂h_i/∂u_i])) W₂      (g_i, u_i) jointly Gaussian

and the same lemma in one dimension gives the means without a derivative, with t ~ N(0, 1):

    E[σ'(z)] = E[σ(μ + s t) t] / s
    E[∂h/∂u] = E[h v] / s_{u|g},     u = μ_u + ρ (g − μ_g) + s_{u|g} v,     ρ = Cov(g, u) / s_g²
    E[∂h/∂g] = E[h t] / s_g − ρ E[∂h/∂u]

taken by quadrature, so that any activation will do. The trapezoidal rule over ±8 is as exact as Gauss-Hermite with as many nodes
where σ is smooth, and ten times as exact where it has a kink (ReLU: 8e-5 of a slope of 1, against 7e-4).

Nothing is solved for, so nothing has to be known of x but d means and the variances of the projections: it takes few tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock, Projection
from ...runtime import Scatter
from ..base import Refused
from .evidence import Evidence
from .neuron_fit import Features, NeuronFit

Array = npt.NDArray[Any]
_T = np.linspace(-8, 8, 257)
_WEIGHTS = np.exp(-_T ** 2 / 2) / np.exp(-_T ** 2 / 2).sum()
_V, _V_WEIGHTS = (part / scale for part, scale in zip(np.polynomial.hermite_e.hermegauss(5), (1.0, np.sqrt(2 * np.pi)),
                                                      strict=True))
_NODES = 32  # of the rule, looked at together
_NEURONS = 2048  # columns of a projection in float64 at a time
_STILL = 1e-6  # of a neuron's size: what moves less is taken to stand still


def fit_stein(block: FFNBlock, evidence: Evidence) -> NeuronFit | Refused:
    """The map, its offset such that the mean of the target is met."""
    if evidence.rows < 2:
        return Refused("one token has no variance: give more feeds", block.input.name)
    moments = evidence.everything()
    matrix = mean_jacobian(block, moments)
    if not np.isfinite(matrix).all():
        return Refused("its mean slope is not finite", block.output.name)
    none = np.zeros(0, np.int64)
    features = Features.of(moments, np.zeros_like(matrix), block.d_model)
    offset = features.mean_t - features.mean_f @ matrix
    return NeuronFit(none, np.zeros((0, block.d_out)), matrix, offset, 0.0,
                     features.error(none, matrix) / max(features.tt, 1e-30))


def mean_jacobian(block: FFNBlock, moments: Scatter) -> Array:
    """E[∂y/∂x] ``[d_model, d_out]`` for Gaussian x.

    Args:
        moments: their first group is x.
    """
    d_model, d_ff = block.d_model, block.d_ff
    mean, covariance = moments.mean[:d_model], moments.covariance[:d_model, :d_model]
    curved = block.up if block.gate is None else block.gate
    means, variances = np.zeros((2, d_ff)), np.zeros((2, d_ff))
    together = np.zeros(d_ff)
    curved_weight, up_weight, down = curved.weight(), block.up.weight(), block.down.weight()
    parts = [slice(start, min(start + _NEURONS, d_ff)) for start in range(0, d_ff, _NEURONS)]
    for part in parts:
        first, second = curved_weight[:, part].astype(np.float64), up_weight[:, part].astype(np.float64)
        spread = covariance @ first
        means[:, part] = mean @ first, mean @ second
        variances[:, part] = (first * spread).sum(axis=0), (second * (covariance @ second)).sum(axis=0)
        together[part] = (second * spread).sum(axis=0)
    means += np.stack([_bias(curved), _bias(block.up)])
    slopes, along = _slopes(block, means, np.sqrt(np.maximum(variances, 0)), together)
    matrix = np.zeros((d_model, block.d_out))
    for part in parts:
        added = curved_weight[:, part] * slopes[part]
        if block.gate is not None:
            added = added + up_weight[:, part] * along[part]
        matrix += added @ down[part].astype(np.float64)
    return matrix


def _slopes(block: FFNBlock, means: Array, sizes: Array, together: Array) -> tuple[Array, Array]:
    """E[∂h/∂g] and E[∂h/∂u] (zeros in an ungated block), ``[d_ff]`` each.

    Args:
        means, sizes: mean and standard deviation of g and u, ``[2, d_ff]``; together: their covariance.
    """
    (mean_g, mean_u), (size_g, size_u) = means, sizes
    per_size = _inverse(size_g, np.abs(mean_g))
    rho = together * per_size ** 2
    beside = np.sqrt(np.maximum(size_u ** 2 - rho * together, 0))
    with_t, with_v = np.zeros(block.d_ff), np.zeros(block.d_ff)
    for start in range(0, len(_T), _NODES):
        t, weights = _T[start:start + _NODES], _WEIGHTS[start:start + _NODES]
        g = mean_g + size_g * t[:, None]
        if block.gate is None:
            with_t += (weights * t) @ block.hidden_from(g)
            continue
        expected = mean_u + rho * (g - mean_g)
        for v, weight in zip(_V, _V_WEIGHTS, strict=True):
            hidden = weight * block.hidden_from(expected + beside * v, g)
            with_t += (weights * t) @ hidden
            with_v += v * (weights @ hidden)
    along = with_v * _inverse(beside, np.abs(mean_u) + size_u)
    return with_t * per_size - rho * along, along


def _inverse(size: Array, scale: Array) -> Array:
    """1 / size, and 0 for what stands still."""
    moves = size > _STILL * scale + 1e-30
    return np.where(moves, 1 / np.where(moves, size, 1), 0)


def _bias(projection: Projection) -> Array:
    bias = projection.bias()
    return np.zeros(projection.d_out) if bias is None else bias.astype(np.float64)
