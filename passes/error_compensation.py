"""Rounding a weight so that later roundings undo the error of earlier ones (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import numpy as np

from .weight_codes import Array, Rounding

_DAMPING = 0.01  # of the mean of the diagonal, added to it
_STRIDE = 128  # inputs whose errors are gathered before they reach the inputs behind them


def compensated_codes(weight: Array, scales: Array, gram: Array, rounding: Rounding) -> tuple[Array, Array]:
    """Codes of ``weight`` that make ``‖X (W − Ŵ)‖`` small rather than ``‖W − Ŵ‖``.

    Inputs are rounded one after the other, those with the largest mean square first where a column has one scale. The
    error e of input i is spread over the inputs not rounded yet, ``W[j] −= e · U[i, j] / U[i, i]``, with U the upper Cholesky
    factor of the inverse of ``H = XᵀX + λI``.

    Args:
        weight: ``[d_in, d_out]``.
        scales: ``[blocks, d_out]``; kept for columns, found again for each block from what the weights are by then.
        gram: ``XᵀX``, ``[d_in, d_in]``, up to a factor.

    Returns:
        Codes int8 ``[d_in, d_out]`` and scales ``[blocks, d_out]``.
    """
    d_in = len(weight)
    moments = gram.astype(np.float64)
    diagonal = np.diag(moments).copy()
    order = np.argsort(-diagonal, kind="stable") if rounding.block is None else np.arange(d_in)
    factor = _inverse_factor(moments[np.ix_(order, order)], diagonal.mean())
    left = weight.astype(np.float64)[order]
    codes = np.zeros(weight.shape, np.int8)
    scales = scales.copy()
    stride = _STRIDE if rounding.block is None else rounding.block
    for start in range(0, d_in, stride):
        stop = min(start + stride, d_in)
        block = 0 if rounding.block is None else start // rounding.block
        if rounding.block is not None:
            found = rounding.scales(left[start:stop].astype(np.float32), diagonal[start:stop])
            if found is not None:
                scales[block] = found[0]
        errors = np.zeros((stop - start, weight.shape[1]))
        for row in range(start, stop):
            code = rounding.rounded(left[row] / scales[block])
            codes[order[row]] = code
            error = (left[row] - code * scales[block]) / factor[row, row]
            left[row + 1:stop] -= np.outer(factor[row, row + 1:stop], error)
            errors[row - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors
    return codes, scales


def _inverse_factor(moments: Array, average: float) -> Array:
    """Upper U with ``UᵀU = (H + λI)⁻¹``, λ raised until there is one. Inputs that are always 0 get ``H[i, i] = 1``."""
    from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

    dead = np.diag(moments) <= 0
    moments[dead, dead] = 1.0
    damping = _DAMPING * (average if average > 0 else 1.0)
    for _ in range(8):
        try:
            lower = linalg.cholesky(moments + damping * np.eye(len(moments)), lower=True)
            inverse = linalg.cho_solve((lower, True), np.eye(len(moments)))
            factor: Array = linalg.cholesky(inverse, lower=False)
            return factor
        except np.linalg.LinAlgError:
            damping *= 10
    return np.eye(len(moments))
