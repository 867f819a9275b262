"""Fewer neurons that still compute what all of them did, from streamed moments.

    y ≈ x A + h_S V + c,    S ⊂ neurons

with V, A, c the weighted least-squares solution, held near what the block has: of all that explain the target equally well,
V is the one nearest to the rows of the down projection, which is right where the feeds say nothing.

    V = argmin Σ_t w_t ‖t_t − h_S V − c‖² + λ Σ_i var(h_i) ‖V_i − W_i‖²

Source: neurons pruned and refitted, STAT arXiv 2406.00061, GRAIL arXiv 2602.23795; with an affine part beside them,
docs/approximations.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime import Scatter

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
_RIDGES = tuple(10.0 ** exponent for exponent in (-5, -4, -3, -2, -1.5, -1, -0.5, 0))
_AS_GOOD = 0.01  # an error larger than the smallest by so much of it is as good
_SMALLEST_RIDGE, _LARGEST_RIDGE = 1e-6, 1e6  # that are tried where products are of no positive definite matrix


@dataclass(frozen=True)
class Features:
    """Centred second moments of features f = [x, h] (x may be left out) and target t, per unit of weight.

    Attributes:
        ff: ``[d_f, d_f]``; ft: ``[d_f, d_out]``; tt: E‖t − E[t]‖².
        mean_f, mean_t: means.
        inputs: how many of the features are inputs (the rest are neurons).
        prior: ``[d_f, d_out]``: the map of all features that the block has now (zeros for inputs).
    """

    ff: Array
    ft: Array
    tt: float
    mean_f: Array
    mean_t: Array
    inputs: int
    prior: Array

    @classmethod
    def of(cls, moments: Scatter, prior: Array, inputs: int) -> Features:
        """From moments of the groups [x, h, t], or [h, t] with ``inputs`` 0."""
        width = len(prior)
        mean, covariance = moments.mean, moments.covariance
        ff, ft = covariance[:width, :width], covariance[:width, width:]
        tt = float(np.trace(covariance[width:, width:]))
        mean_f, mean_t = mean[:width], mean[width:]
        return cls(ff, ft, tt, mean_f, mean_t, inputs, prior)

    @property
    def neurons(self) -> int:
        """How many of the features are neurons."""
        return len(self.prior) - self.inputs

    def chosen(self, neurons: Indices) -> Indices:
        """Feature numbers of all inputs and of ``neurons``."""
        return np.concatenate([np.arange(self.inputs), self.inputs + np.sort(neurons)]).astype(np.int64)

    def penalty(self, features: Indices) -> Array:
        """What a change of each feature's row costs, at λ = 1: its variance, and a little for those that never move."""
        variance = np.diag(self.ff)[features]
        return variance + 1e-3 * float(np.mean(np.diag(self.ff))) + 1e-30

    def solve(self, neurons: Indices, ridge: float) -> Array:
        """The map ``[inputs + len(neurons), d_out]`` of the features kept.

        Where there are fewer tokens than features, rounding may leave products of no positive definite matrix: the smallest
        ridge that mends it is taken then.
        """
        from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

        kept = self.chosen(neurons)
        while True:
            penalty = ridge * self.penalty(kept)
            left = self.ff[np.ix_(kept, kept)]
            left[np.diag_indices_from(left)] += penalty
            try:
                factor = linalg.cho_factor(left, lower=True, overwrite_a=True, check_finite=False)
            except linalg.LinAlgError:
                if ridge > _LARGEST_RIDGE:
                    raise
                ridge = max(10 * ridge, _SMALLEST_RIDGE)
                continue
            right = self.ft[kept] + penalty[:, None] * self.prior[kept]
            return linalg.cho_solve(factor, right, overwrite_b=True, check_finite=False)

    def error(self, neurons: Indices, matrix: Array, offset: Array | None = None) -> float:
        """E‖t − f_S M − c‖², c the best one where ``offset`` is None."""
        kept = self.chosen(neurons)
        inner = self.ff[np.ix_(kept, kept)] @ matrix
        spread = self.tt + float(np.vdot(matrix, inner)) - 2 * float(np.vdot(matrix, self.ft[kept]))
        shift = 0.0 if offset is None else float(np.sum((self.mean_t - self.mean_f[kept] @ matrix - offset) ** 2))
        return spread + shift


@dataclass(frozen=True)
class NeuronFit:
    """``y ≈ x A + h_S V + c``.

    Attributes:
        neurons: S, ascending.
        matrix: V ``[len(S), d_out]``; affine: A ``[d_model, d_out]`` or None; offset: c ``[d_out]``.
        ridge: the λ that won; error: E‖t − ŷ‖² / E‖t − E[t]‖² on tokens held out (on those fitted to, where none are).
        projections: for each leaf of the block's region the matrix ``[d_model, len(S)]`` and the bias ``[len(S)]`` (or None)
            that its linear gets; empty: what it has.
    """

    neurons: Indices
    matrix: Array
    affine: Array | None
    offset: Array
    ridge: float
    error: float
    projections: tuple[tuple[Array, Array | None], ...] = ()

    def to_arrays(self) -> dict[str, Array]:
        """What it holds, for a file."""
        arrays = {"neurons": self.neurons, "matrix": self.matrix, "offset": self.offset, "ridge": np.asarray(self.ridge),
                  "error": np.asarray(self.error), **({} if self.affine is None else {"affine": self.affine})}
        for leaf, (matrix, bias) in enumerate(self.projections):
            arrays |= {f"matrix_{leaf}": matrix, **({} if bias is None else {f"bias_{leaf}": bias})}
        return arrays

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> NeuronFit:
        """The one that gave ``arrays``; KeyError where one is missing."""
        leaves = sorted(name.removeprefix("matrix_") for name in arrays if name.startswith("matrix_"))
        return cls(arrays["neurons"], arrays["matrix"], arrays.get("affine"), arrays["offset"], float(arrays["ridge"]),
                   float(arrays["error"]), tuple((arrays[f"matrix_{leaf}"], arrays.get(f"bias_{leaf}")) for leaf in leaves))


def choose_ridge(fit: Features, held_out: Features | None, neurons: Indices) -> tuple[float, float]:
    """The largest λ whose error on tokens held out is as good as the smallest, and that error as a part of the target's variance.

    Tokens of a sentence err together, so there are fewer observations than tokens: a fit that is too free shows that little in
    the error of single tokens, and much in what a model makes of all of them.
    """
    if held_out is None:
        return 1e-3, fit.error(neurons, fit.solve(neurons, 1e-3)) / max(fit.tt, 1e-30)
    kept = fit.chosen(neurons)
    errors = {}
    for ridge in _RIDGES:
        matrix = fit.solve(neurons, ridge)
        errors[ridge] = held_out.error(neurons, matrix, fit.mean_t - fit.mean_f[kept] @ matrix)
    least = min(errors.values())
    best = max(ridge for ridge, error in errors.items() if error <= least + _AS_GOOD * max(least, 0.0))
    return best, errors[best] / max(held_out.tt, 1e-30)


def refit(everything: Features, neurons: Indices, ridge: float, error: float) -> NeuronFit:
    """The fit on all tokens."""
    matrix = everything.solve(neurons, ridge)
    return _fit(everything, neurons, matrix, ridge, error)


def keep_rows(everything: Features, neurons: Indices, *, correct_bias: bool, bias: Array) -> NeuronFit:
    """The rows that the down projection has, with its own bias, or with the mean of what is gone added to it.

    Source: FLAP, arXiv 2312.11983.
    """
    kept = everything.chosen(neurons)
    matrix = everything.prior[kept]
    error = everything.error(neurons, matrix, None if correct_bias else bias) / max(everything.tt, 1e-30)
    found = _fit(everything, neurons, matrix, 0.0, error)
    return found if correct_bias else NeuronFit(found.neurons, found.matrix, None, bias, 0.0, error)


def _fit(features: Features, neurons: Indices, matrix: Array, ridge: float, error: float) -> NeuronFit:
    kept = features.chosen(neurons)
    offset = features.mean_t - features.mean_f[kept] @ matrix
    inputs = features.inputs
    return NeuronFit(np.sort(neurons), matrix[inputs:], matrix[:inputs] if inputs else None, offset, ridge, error)
