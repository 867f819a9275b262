"""The best product of two thin matrices in the place of one, where some directions of the input count more than others.

    minimize ‖R (W − U V)‖_F over U [d_in, r], V [r, d_out]        R any R with G = Rᵀ R

Its solution is ``U = W V_r, V = V_rᵀ``, V_r the r leading right singular vectors of R W: the truncated SVD of the whitened
matrix, multiplied back. They are eigenvectors of Wᵀ G W, or follow from those of R W Wᵀ Rᵀ, whichever is smaller.

Source: SVD-LLM, arXiv 2403.07378; without G the theorem of Eckart and Young.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DAMPING = 1e-2  # of the mean of G's diagonal, added to it


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of R W, descending, and the right singular vectors that go with them.

    Attributes:
        energy: ``[k]``; directions: ``[d_out, k]``, k = min(d_in, d_out).
    """

    matrix: Array
    energy: Array
    directions: Array

    def factors(self, rank: int) -> tuple[Array, Array]:
        """U ``[d_in, rank]`` and V ``[rank, d_out]``."""
        leading = self.directions[:, :rank]
        return self.matrix @ leading, np.ascontiguousarray(leading.T)

    def lost(self, rank: int) -> float:
        """The part of the energy that ``rank`` directions leave out."""
        return float(self.energy[rank:].sum() / max(self.energy.sum(), 1e-300))

    def rank_for(self, energy: float) -> int:
        """The smallest rank that holds the part ``energy`` of the energy."""
        held = np.cumsum(self.energy) / max(self.energy.sum(), 1e-300)
        return min(int(np.searchsorted(held, energy - 1e-12)) + 1, len(self.energy))


def spectrum(matrix: Array, gram: Array | None) -> Spectrum:
    """The spectrum of ``matrix [d_in, d_out]`` for inputs with second moments ``gram [d_in, d_in]`` (None: all alike)."""
    from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

    d_in, d_out = matrix.shape
    metric = np.eye(d_in) if gram is None else gram + DAMPING * max(float(np.diag(gram).mean()), 1e-30) * np.eye(d_in)
    if d_out <= d_in:
        energy, vectors = linalg.eigh(matrix.T @ metric @ matrix, check_finite=False)
        return Spectrum(matrix, np.maximum(energy[::-1], 0), np.ascontiguousarray(vectors[:, ::-1]))
    sizes, axes = linalg.eigh(metric, check_finite=False)  # no Cholesky: rounding may leave an eigenvalue below zero
    white = (axes * np.sqrt(np.maximum(sizes, 0))).T @ matrix
    energy, vectors = linalg.eigh(white @ white.T, check_finite=False)
    energy, vectors = np.maximum(energy[::-1], 0), vectors[:, ::-1]
    directions = white.T @ vectors
    return Spectrum(matrix, energy, directions / np.maximum(np.linalg.norm(directions, axis=0), 1e-30))
