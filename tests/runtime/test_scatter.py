"""Covariances of streamed float32 rows against NumPy's of all rows in float64."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.runtime import Scatter


@pytest.fixture
def data(random):
    x = (random.standard_normal((5000, 5)) + 3).astype(np.float32)
    return x, x.astype(np.float64) @ random.standard_normal((5, 2)), random.random(5000)


def test_scatter_in_parts_is_that_of_the_whole(data):
    x, y, weights = data
    first, second, merged = Scatter(), Scatter(), Scatter()
    first.update(x[:10], y[:10], weights=weights[:10])
    for start in range(10, 5000, 499):
        part = slice(start, start + 499)
        second.update(x[part], y[part], weights=weights[part])
    merged.merge(first)
    merged.merge(second)
    merged.merge(Scatter())
    both = np.hstack([x, y])
    assert (merged.rows, merged.widths) == (5000, (5, 2))
    np.testing.assert_allclose(merged.weight, weights.sum())
    np.testing.assert_allclose(merged.mean, np.average(both, axis=0, weights=weights), rtol=1e-6)
    np.testing.assert_allclose(merged.group_mean(1), np.average(y, axis=0, weights=weights), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged.covariance, np.cov(both.T, aweights=weights, bias=True), rtol=1e-5, atol=1e-6)


def test_a_large_mean_costs_no_digits(random):
    """float32 products of the values themselves would lose a variance that is 1e-12 of the squared mean."""
    x = (random.standard_normal((5000, 3)) * 1e-3 + 1000).astype(np.float32)
    scatter = Scatter()
    scatter.update(x)
    np.testing.assert_allclose(np.diag(scatter.covariance), x.astype(np.float64).var(axis=0), rtol=1e-4)


def test_merging_leaves_the_other_as_it_was(data):
    x, _, _ = data
    first, second = Scatter(), Scatter()
    second.update(x[:100])
    covariance = second.covariance
    first.merge(second)
    first.update(x[100:] + 1)
    np.testing.assert_array_equal(second.covariance, covariance)


def test_what_does_not_fit_together_is_an_error(data):
    x, y, weights = data
    scatter = Scatter()
    with pytest.raises(ValueError, match="no row was seen"):
        scatter.mean  # noqa: B018
    scatter.update(x, y)
    with pytest.raises(ValueError, match="expected columns"):
        scatter.update(x)
    with pytest.raises(ValueError, match="weights"):
        scatter.update(x, y, weights=-weights)


def test_the_mean_of_a_few_rows_that_still_wait():
    scatter = Scatter()
    scatter.update(np.array([[1, 2], [3, 6]], np.float32), weights=np.array([1.0, 3.0]))
    np.testing.assert_allclose(scatter.mean, [2.5, 5])
