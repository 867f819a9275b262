"""Grids of shapes."""

from __future__ import annotations

import pytest
from ffnfold.graph.errors import InputError
from ffnfold.runtime.grid import parse_grid, shape_text


@pytest.mark.parametrize(("texts", "points"), [
    ([], [{}]),
    (["x=1x128"], [{"x": (1, 128)}]),
    (["x="], [{"x": ()}]),
    (["x=1,8x16,128"], [{"x": shape} for shape in ((1, 16), (1, 128), (8, 16), (8, 128))]),
    (["x=1x16", "x=8x128"], [{"x": (1, 16)}, {"x": (8, 128)}]),
    (["x=1x16", "mask=1x16"], [{"x": (1, 16), "mask": (1, 16)}]),
    (["x=1,8x16", "mask=1,8x16"], [{"x": (n, 16), "mask": (n, 16)} for n in (1, 8)]),
    (["x=1,8x16", "image=3"], [{"x": (n, 16), "image": (3,)} for n in (1, 8)]),
    (["a=b=1x2"], [{"a=b": (1, 2)}]),
    (["x=1x16", "x=1x16"], [{"x": (1, 16)}]),
])
def test_points(texts, points):
    assert parse_grid(texts) == points


@pytest.mark.parametrize("text", ["x", "=1x2", "x=1x", "x=1,", "x=,1", "x=1x-2", "x=1x two", "x=1.5"])
def test_other_texts_are_refused(text, one_line):
    with pytest.raises(InputError) as caught:
        parse_grid([text])
    one_line(caught.value, "write it like NAME=1x128")


@pytest.mark.parametrize("text", ["x=0x8", "x=1,0x8", "x=8x00"])
def test_sizes_of_nothing_are_refused(text, one_line):
    with pytest.raises(InputError) as caught:
        parse_grid([text])
    one_line(caught.value, "a size is at least 1")


def test_inputs_with_different_numbers_of_shapes_are_refused(one_line):
    with pytest.raises(InputError) as caught:
        parse_grid(["x=1,2,4x8", "mask=1,2x8"])
    one_line(caught.value, "'mask' has 2 shapes and 'x' has 3")


def test_a_point_for_people():
    assert shape_text({"ids": (8, 128), "scale": ()}) == "ids 8x128, scale scalar"
