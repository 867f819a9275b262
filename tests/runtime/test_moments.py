"""Streamed moments against NumPy on all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.runtime import DiagonalMoments, Moments


@pytest.fixture
def data(random):
    x = random.standard_normal((9000, 5)).astype(np.float32) + 3
    y = (x @ random.standard_normal((5, 2))).astype(np.float32)
    return x, y, random.random(9000)


def test_moments_in_parts_are_those_of_the_whole(data):
    x, y, weights = data
    first, second = Moments(), Moments()
    first.update(x[:10], y[:10], weights=weights[:10])
    second.update(x[10:], y[10:], weights=weights[10:])
    merged = Moments()
    merged.merge(first)
    merged.merge(second)
    merged.merge(Moments())
    both = np.hstack([x, y]).astype(np.float64)
    assert (merged.rows, merged.widths) == (9000, (5, 2))
    np.testing.assert_allclose(merged.weight, weights.sum())
    np.testing.assert_allclose(merged.mean, np.average(both, axis=0, weights=weights))
    np.testing.assert_allclose(merged.gram, (both * weights[:, None]).T @ both, rtol=1e-11)
    np.testing.assert_allclose(merged.covariance, np.cov(both.T, aweights=weights, bias=True), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(merged.cross(0, 1), (x.astype(np.float64) * weights[:, None]).T @ y, rtol=1e-11)
    np.testing.assert_allclose(merged.group_mean(1), np.average(y.astype(np.float64), axis=0, weights=weights))
    np.testing.assert_allclose(merged.augmented[0, 1:], merged.mean * merged.weight)
    assert (merged.gram == merged.gram.T).all()


def test_without_weights_each_row_counts_once(data):
    x, _, _ = data
    moments = Moments()
    moments.update(x)
    assert moments.weight == 9000
    np.testing.assert_allclose(moments.mean, x.mean(axis=0, dtype=np.float64))


def test_float32_rows_are_multiplied_in_float64(random):
    x = (random.standard_normal((5000, 3)) * 1e-3 + 1000).astype(np.float32)
    moments = Moments()
    moments.update(x)
    np.testing.assert_allclose(np.diag(moments.covariance), x.astype(np.float64).var(axis=0), rtol=1e-2)


def test_merging_leaves_the_other_as_it_was(data):
    x, _, _ = data
    first, second = Moments(), Moments()
    second.update(x[:100])
    gram = second.gram.copy()
    first.merge(second)
    first.update(x[100:])
    np.testing.assert_array_equal(second.gram, gram)


def test_diagonal_moments_are_those_of_each_pair(data):
    x, _, weights = data
    h = np.maximum(x, 3)
    first, second, merged = DiagonalMoments(), DiagonalMoments(), DiagonalMoments()
    first.update(x[:10], h[:10], weights[:10])
    second.update(x[10:], h[10:], weights[10:])
    merged.merge(first)
    merged.merge(second)
    for neuron in range(5):
        cov = np.cov(x[:, neuron].astype(np.float64), h[:, neuron].astype(np.float64), aweights=weights, bias=True)
        np.testing.assert_allclose([[merged.variance_z[neuron], merged.covariance[neuron]],
                                    [merged.covariance[neuron], merged.variance_h[neuron]]], cov, rtol=1e-9)
    np.testing.assert_allclose(merged.mean_z, np.average(x.astype(np.float64), axis=0, weights=weights))
    np.testing.assert_allclose(merged.mean_h, np.average(h.astype(np.float64), axis=0, weights=weights))
    assert merged.rows == 9000


def test_what_does_not_fit_is_refused(data):
    x, y, weights = data
    moments = Moments()
    moments.update(x, y)
    with pytest.raises(ValueError, match="columns"):
        moments.update(x)
    with pytest.raises(ValueError, match="rows"):
        moments.update(x, y[:3])
    with pytest.raises(ValueError, match="weights"):
        moments.update(x, y, weights=-weights)
    with pytest.raises(ValueError, match="no row"):
        Moments().mean  # noqa: B018
    with pytest.raises(ValueError, match="no row"):
        DiagonalMoments().mean_z  # noqa: B018
