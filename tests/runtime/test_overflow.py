"""The first node whose numbers are not finite any more."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffnfold.graph.model import Model
from ffnfold.runtime import Feeds
from ffnfold.runtime.overflow import first_overflow, has_float16
from onnx import TensorProto, helper

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
FEEDS = Feeds.of([{"x": np.full((1, 4), value, np.float32)} for value in (1, 2, 300)])


def squares(workshop, kind, name):
    """x → a = x·x → b = a·a → y = b − a, in ``kind``, x and y in float32."""
    nodes = [helper.make_node("Cast", ["x"], ["narrow"], to=kind),
             helper.make_node("Mul", ["narrow", "narrow"], ["a"], name="first"),
             helper.make_node("Mul", ["a", "a"], ["b"], name="second"),
             helper.make_node("Sub", ["b", "a"], ["c"], name="third"), helper.make_node("Cast", ["c"], ["y"], to=SINGLE)]
    path = workshop.save(nodes, {"x": (SINGLE, ["n", 4])}, {"y": (SINGLE, ["n", 4])}, name=name)
    return Model.load(path)


def test_the_node_the_feed_and_the_size_of_its_inputs_are_named(workshop):
    found = first_overflow(squares(workshop, HALF, "half.onnx"), squares(workshop, SINGLE, "single.onnx"), FEEDS)
    assert (found.node, found.op, found.value, found.feed, found.count) == ("first", "Mul", "a", 2, 4)
    assert found.largest_input == 300
    assert not found.reaches_output  # the CPU goes on in float32
    assert str(found).startswith("Mul node 'first' is the first whose numbers are not finite: 4 of 'a' on feed 2")


def test_only_where_it_overflows(workshop):
    half, single = squares(workshop, HALF, "half.onnx"), squares(workshop, SINGLE, "single.onnx")
    assert first_overflow(half, single, FEEDS[:2]) is None
    found = first_overflow(half, single, Feeds.of([{"x": np.full((1, 4), 100, np.float32)}]))
    assert (found.node, found.largest_input) == ("second", 1e4)


def test_an_output_that_is_not_finite_leads_to_its_own_cause(workshop):
    """a overflows and goes nowhere (a maximum takes it out of the way); b overflows and comes out."""
    def model(kind, name):
        limit = onnx.numpy_helper.from_array(np.array(1, np.float16 if kind == HALF else np.float32), "limit")
        nodes = [helper.make_node("Cast", ["x"], ["narrow"], to=kind),
                 helper.make_node("Mul", ["narrow", "narrow"], ["a"], name="harmless"),
                 helper.make_node("Min", ["a", "limit"], ["small"], name="least"),
                 helper.make_node("Add", ["small", "narrow"], ["c"], name="sum"),
                 helper.make_node("Mul", ["c", "narrow"], ["y"], name="last")]
        return Model.load(workshop.save(nodes, {"x": (SINGLE, ["n", 4])}, {"y": (kind, ["n", 4])}, {"limit": limit}, name))

    found = first_overflow(model(HALF, "half.onnx"), model(SINGLE, "single.onnx"), FEEDS)
    assert (found.node, found.value, found.feed, found.reaches_output) == ("last", "y", 2, True)


def masked(workshop, kind, name, size):
    """y = softmax(x·size + mask), the mask the lowest float32, as exporters write it, cast to ``kind``."""
    lowest = onnx.numpy_helper.from_array(np.array([0, np.finfo(np.float32).min, 0, 0], np.float32), "lowest")
    scale = onnx.numpy_helper.from_array(np.array(size, np.float32), "size")
    nodes = [helper.make_node("Cast", ["x"], ["narrow"], to=kind), helper.make_node("Cast", ["size"], ["factor"], to=kind),
             helper.make_node("Cast", ["lowest"], ["mask"], to=kind, name="mask"),
             helper.make_node("Mul", ["narrow", "factor"], ["scaled"], name="scale"),
             helper.make_node("Add", ["scaled", "mask"], ["scores"], name="scores"),
             helper.make_node("Softmax", ["scores"], ["chosen"], axis=-1, name="softmax"),
             helper.make_node("Cast", ["chosen"], ["y"], to=SINGLE)]
    return Model.load(workshop.save(nodes, {"x": (SINGLE, ["n", 4])}, {"y": (SINGLE, ["n", 4])},
                                    {"lowest": lowest, "size": scale}, name))


def test_a_mask_that_becomes_minus_infinity_is_no_overflow(workshop):
    assert first_overflow(masked(workshop, HALF, "half.onnx", 1), masked(workshop, SINGLE, "single.onnx", 1), FEEDS) is None


def test_the_overflow_beside_a_mask_is_found(workshop):
    half, single = masked(workshop, HALF, "half.onnx", 1000), masked(workshop, SINGLE, "single.onnx", 1000)
    assert first_overflow(half, single, FEEDS).node == "scale"


def test_what_is_infinite_in_the_reference_too_is_none(workshop):
    single = squares(workshop, SINGLE, "single.onnx")
    assert first_overflow(single, single, Feeds.of([{"x": np.full((1, 4), 1e30, np.float32)}])) is None


@pytest.mark.parametrize("kind", [HALF, SINGLE])
def test_whether_a_model_is_in_half_precision(workshop, kind):
    path = workshop.identity(kind, ["n"])
    assert has_float16(Model.load(path)) == (kind == HALF)
