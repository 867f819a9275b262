"""The roofline: measured roofs, and bounds."""

from __future__ import annotations

import pytest
from ffnfold.runtime.roofline import Roof, measure_roof
from ffnfold.runtime.work import Work

ROOF = Roof({"float32": 100.0, "int8": 400.0}, 10.0)


def test_a_product_of_many_rows_is_bound_by_computing():
    bound, limit = ROOF.bound_ms(Work({"float32": 10 ** 9}, 10 ** 6, 0))
    assert (bound, limit) == (pytest.approx(10), "compute")


def test_one_row_is_bound_by_memory():
    bound, limit = ROOF.bound_ms(Work({"float32": 10 ** 6}, 90 * 10 ** 6, 10 ** 7))
    assert (bound, limit) == (pytest.approx(10), "memory")


def test_types_add_up_at_their_own_rates():
    assert ROOF.bound_ms(Work({"float32": 10 ** 9, "int8": 10 ** 9}, 0, 0))[0] == pytest.approx(10 + 2.5)


def test_the_entry_says_what_share_of_the_roof_was_reached():
    entry = ROOF.entry(Work({"float32": 10 ** 9}, 10 ** 6, 0), 40.0)
    assert entry["reached"] == pytest.approx(0.25)
    assert entry["operations_per_byte"] == 1000


def test_the_machine_is_measured_for_the_types_asked_for():
    roof = measure_roof(["int8", "float32", "int8"], threads=1, seconds=0)
    assert list(roof.gops) == ["float32", "int8"]
    assert all(rate > 0 for rate in (*roof.gops.values(), roof.read_gbs))
    assert list(roof.to_json()) == ["matmul_gops", "read_gbs"]
