"""Changing the rows of a weight one after the other so that later rows undo the error of earlier ones.

Rounding so is GPTQ (arXiv 2210.17323), setting to zero so is SparseGPT (arXiv 2301.00774). With U the upper Cholesky factor of
the inverse of ``H = XᵀX + λI``, the error e of input i is spread over the inputs behind it by
``W[j] −= e · U[i, j] / U[i, i]``, which makes ``‖X (W − Ŵ)‖`` as small as it can be with the rows up to i as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .weight_codes import Array, Rounding

_DAMPING = 0.01  # of the mean of the diagonal, added to it
STRIDE = 128  # inputs whose errors are gathered before they reach the inputs behind them


@dataclass(frozen=True)
class Spreading:
    """How errors of rounding are spread, for all linears that read the same value.

    Attributes:
        order: the inputs as they are rounded, ``[d_in]``.
        squares: their ``Σ x²`` up to a factor, in the order of the weight.
        factor: U for them, in the order of rounding, ``[d_in, d_in]``.
    """

    order: Array
    squares: Array
    factor: Array

    @classmethod
    def of(cls, gram: Array, rounding: Rounding) -> Spreading:
        """From ``XᵀX`` up to a factor, ``[d_in, d_in]``. The largest inputs come first where a column has one scale."""
        moments = gram.astype(np.float64)
        squares = np.diag(moments).copy()
        order = np.argsort(-squares, kind="stable") if rounding.block is None else np.arange(len(squares))
        return cls(order, squares, inverse_factor(moments[np.ix_(order, order)], squares.mean()))


def compensated_codes(weight: Array, scales: Array, spreading: Spreading, rounding: Rounding) -> tuple[Array, Array]:
    """Codes of ``weight`` that make ``‖X (W − Ŵ)‖`` small rather than ``‖W − Ŵ‖``.

    Args:
        weight: ``[d_in, d_out]``.
        scales: ``[blocks, d_out]``; kept for columns, found again for each block from what the weights are by then.

    Returns:
        Codes int8 ``[d_in, d_out]`` and scales ``[blocks, d_out]``.
    """
    order = spreading.order
    left = weight.astype(np.float64)[order]
    codes = np.zeros(weight.shape, np.int8)
    scales = scales.copy()

    def rounding_of(start: int, part: Array) -> Callable[[int, Array], Array]:
        block = 0 if rounding.block is None else start // rounding.block
        if rounding.block is not None:
            found = rounding.scales(part.astype(np.float32), spreading.squares[start:start + len(part)])
            if found is not None:
                scales[block] = found[0]

        def rounded(row: int, values: Array) -> Array:
            code = rounding.rounded(values / scales[block])
            codes[order[row]] = code
            return np.asarray(code * scales[block])

        return rounded

    settle_rows(left, spreading.factor, STRIDE if rounding.block is None else rounding.block, rounding_of)
    return codes, scales


def settle_rows(left: Array, factor: Array, stride: int, begin: Callable[[int, Array], Callable[[int, Array], Array]]) -> None:
    """Change the rows of ``left [d_in, d_out]`` in place, each for the one that is settled for it.

    Args:
        factor: U, ``[d_in, d_in]``.
        stride: rows whose errors are gathered before they reach the rows behind them.
        begin: given the first row of a stride and a view of its rows as they are by then, gives what settles a row, given its
            number and what it is by then.
    """
    for start in range(0, len(left), stride):
        stop = min(start + stride, len(left))
        settle = begin(start, left[start:stop])
        errors = np.zeros((stop - start, left.shape[1]))
        for row in range(start, stop):
            settled = settle(row, left[row])
            error = (left[row] - settled) / factor[row, row]
            left[row] = settled
            left[row + 1:stop] -= np.outer(factor[row, row + 1:stop], error)
            errors[row - start] = error
        left[stop:] -= factor[start:stop, stop:].T @ errors


def inverse_factor(moments: Array, average: float) -> Array:
    """Upper U with ``UᵀU = (H + λI)⁻¹``, λ raised until there is one. Inputs that are always 0 get ``H[i, i] = 1``.

        P (H + λI) P = L Lᵀ, P the reversal of the order   →   U = P L⁻¹ P
    """
    from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

    dead = np.diag(moments) <= 0
    moments[dead, dead] = 1.0
    damping = _DAMPING * (average if average > 0 else 1.0)
    for _ in range(8):
        try:
            backwards = (moments + damping * np.eye(len(moments)))[::-1, ::-1]
            lower = linalg.cholesky(backwards, lower=True, overwrite_a=True)
            inverse, failed = linalg.lapack.dtrtri(lower, lower=1, overwrite_c=1)
            if not failed:
                return np.ascontiguousarray(inverse[::-1, ::-1])
        except np.linalg.LinAlgError:
            pass
        damping *= 10
    return np.eye(len(moments))
