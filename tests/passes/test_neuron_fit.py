"""The fit that the approximate passes share: it goes through where there are fewer tokens than features, too."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.passes.fitting.neuron_fit import Features
from scipy import linalg

WIDTH, OUT = 48, 8


def few_tokens(tokens: int = 12, loud: float = 1e4) -> Features:
    """Moments of fewer tokens than features, one feature a thousand times as loud, products rounded to float32."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((tokens, WIDTH))
    features[:, 0] *= loud
    target = features @ rng.standard_normal((WIDTH, OUT)) * 1e-3
    ff = (features.T.astype(np.float32) @ features.astype(np.float32)).astype(np.float64) / tokens
    ft = features.T @ target / tokens
    return Features(ff, ft, float(np.mean(np.sum(target ** 2, axis=1))), features.mean(axis=0), target.mean(axis=0), 0,
                    np.zeros((WIDTH, OUT)))


def test_rounded_products_of_few_tokens_are_fitted():
    fit = few_tokens()
    everything = np.arange(WIDTH)
    ridge = 1e-14
    left = fit.ff + np.diag(ridge * fit.penalty(everything))
    with pytest.raises(linalg.LinAlgError):
        linalg.cho_factor(left, lower=True)
    matrix = fit.solve(everything, ridge)
    assert np.isfinite(matrix).all()
    assert fit.error(everything, matrix) < 0.01 * fit.tt

