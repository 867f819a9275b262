"""Which neurons of a block stay.

    magnitude   ‖w_i‖                     w_i the row of the down projection
    wanda       ‖w_i‖ · ‖h_i‖₂            |W|·‖x‖ of arXiv 2306.11695, summed over the row as neurons go whole
    flap        Var(h_i) · ‖w_i‖²         fluctuation, arXiv 2312.11983
    qr          pivoted Cholesky factorization of the Gram matrix of h_i · ‖w_i‖: a neuron goes in where the others
                so far explain it least (STAT, arXiv 2406.00061)
    greedy      neurons leave, those first whose loss the refitted others make good best:
                ‖V_i‖² / [(Σ + λD)⁻¹]_ii, the saliency of optimal brain surgery (OBS)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .neuron_fit import Features

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Select = Literal["wanda", "flap", "magnitude", "qr", "greedy"]
_ROUND = 0.02  # part of the neurons that leave between two updates


def select_neurons(how: Select, features: Features, count: int, ridge: float) -> Indices:
    """The ``count`` neurons that stay, ascending.

    Args:
        features: moments of the block.
        ridge: λ of ``greedy``.
    """
    if count >= features.neurons:
        return np.arange(features.neurons)
    if how == "greedy":
        return eliminate(features, count, ridge)
    inputs = features.inputs
    size = np.linalg.norm(features.prior[inputs:], axis=1)
    variance = np.maximum(np.diag(features.ff)[inputs:], 0)
    if how == "qr":
        return _pivoted(features.ff[inputs:, inputs:] * np.outer(size, size), count)
    scores = {"magnitude": size, "wanda": size * np.sqrt(variance + features.mean_f[inputs:] ** 2),
              "flap": variance * size ** 2}[how]
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _pivoted(gram: Array, count: int) -> Indices:
    left = gram.copy()
    chosen: list[int] = []
    factor = np.zeros((count, len(gram)))
    diagonal = np.diag(left).copy()
    for step in range(count):
        diagonal[chosen] = -np.inf
        pivot = int(np.argmax(diagonal))
        if diagonal[pivot] <= 0:
            rest = [int(i) for i in np.argsort(-np.diag(gram), kind="stable") if int(i) not in set(chosen)]
            chosen += rest[:count - len(chosen)]
            break
        row = (gram[pivot] - factor[:step, pivot] @ factor[:step]) / np.sqrt(diagonal[pivot])
        factor[step] = row
        diagonal = diagonal - row ** 2
        chosen.append(pivot)
    return np.sort(np.asarray(chosen, np.int64))


def eliminate(features: Features, count: int, ridge: float) -> Indices:
    """Backward elimination down to ``count`` neurons."""
    return elimination(features, [count], ridge)[count][0]


def elimination(features: Features, counts: list[int], ridge: float) -> dict[int, tuple[Indices, float]]:
    """Backward elimination, stopping at each of ``counts``.

    Returns:
        count → the neurons left, ascending, and how much E‖t − ŷ‖² grew by so far (at fixed λ).
    """
    from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

    everything = np.arange(len(features.prior))
    penalty = ridge * features.penalty(everything)
    inverse = linalg.inv(features.ff + np.diag(penalty), check_finite=False)
    matrix = inverse @ (features.ft + penalty[:, None] * features.prior)
    left = np.ones(len(everything), bool)
    left[:features.inputs] = False  # inputs always stay
    grown, found = 0.0, {}
    for target in sorted(set(counts), reverse=True):
        while left.sum() > target:
            alive = np.flatnonzero(left)
            number = max(1, min(int(len(alive) * _ROUND), len(alive) - target))
            saliency = (matrix[alive] ** 2).sum(axis=1) / np.maximum(np.diag(inverse)[alive], 1e-300)
            gone = alive[np.argpartition(saliency, number - 1)[:number]] if number < len(alive) else alive
            block = linalg.inv(inverse[np.ix_(gone, gone)], check_finite=False)
            rows, outputs = inverse[gone], matrix[gone]
            scaled = rows.T @ block
            grown += float(np.vdot(outputs, block @ outputs))
            matrix -= scaled @ outputs
            inverse -= scaled @ rows
            left[gone] = False
        found[target] = (np.flatnonzero(left) - features.inputs, grown)
    return found
