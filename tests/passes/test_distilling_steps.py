"""Steps on the device against those of NumPy, and which feeds a step sees."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch
from ffnfold.graph.model import Model
from ffnfold.passes.base import Context
from ffnfold.passes.distilling.batches import Batches
from ffnfold.passes.distilling.steps import Steps
from ffnfold.passes.distilling.student import Student
from ffnfold.passes.fitting.adam import adam_step
from ffnfold.runtime import Feeds
from ffnfold.runtime.ort_values import array_value, to_array
from onnx import TensorProto

WORDS, D = 300, 8
START = {"matrix": (5, 7), "vector": (6,)}


def numbers(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in START.items()}


def values(arrays):
    return {name: array_value(array, TensorProto.FLOAT) for name, array in arrays.items()}


def test_steps_are_those_of_numpy():
    weights = numbers(0)
    free = {"matrix": numbers(9)["matrix"] > 0}
    steps = Steps(weights, free, Context())
    here = {name: array.copy() for name, array in weights.items()}
    first, second = ({name: np.zeros_like(array) for name, array in weights.items()} for _ in range(2))
    for number in range(1, 6):
        gradient = numbers(number)
        rates = {"matrix": 0.1 / number, "vector": 0.01}
        assert steps.step(values(gradient), rates)
        for name, array in gradient.items():
            array *= free.get(name, True)
            adam_step(here[name], array, first[name], second[name], number, rates[name])
    found = steps.state()
    for name, expected in here.items():
        np.testing.assert_allclose(found["weight", name], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["second", name], second[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found["weight", "matrix"][~free["matrix"]], weights["matrix"][~free["matrix"]])
    assert steps.taken == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_no_step_without_a_finite_gradient(bad):
    weights = numbers(0)
    steps = Steps(weights, {}, Context())
    gradient = {} if bad is None else numbers(1)
    if gradient:
        gradient["vector"][2] = bad
    assert not steps.step(values(gradient), {"matrix": 0.1, "vector": 0.1})
    for name, expected in weights.items():
        np.testing.assert_array_equal(to_array(steps.weights[name]), expected)
    assert steps.taken == 0
    assert steps.step(values(numbers(1)), {"matrix": 0.1, "vector": 0.1})
    np.testing.assert_allclose(np.abs(to_array(steps.weights["matrix"]) - weights["matrix"]), 0.1, rtol=1e-4)


def test_it_goes_on_where_it_was():
    rates = {"matrix": 0.1, "vector": 0.1}
    whole = Steps(numbers(0), {}, Context())
    for number in range(1, 3):
        whole.step(values(numbers(number)), rates)
    state, done = whole.state(), whole.taken
    whole.step(values(numbers(3)), rates)
    again = Steps(numbers(7), {}, Context())
    again.restore(state, done)
    again.step(values(numbers(3)), rates)
    for name in START:
        np.testing.assert_array_equal(to_array(again.weights[name]), to_array(whole.weights[name]))


def batches(tmp_path, feeds, *, joined: bool, rows: str | int = "batch", fixed: bool = False) -> Batches:
    """Of a model that adds up rows of words, and which may be able to take one row alone."""
    s = Sketch()
    ids = s.input("ids", [rows, "tokens"], TensorProto.INT64)
    x = s.op("Gather", s.weight(s.numbers(WORDS, D)), ids)
    x = s.op("Reshape", x, s.weight(np.array([1, -1, D]))) if fixed else x
    s.op("MatMul", x, s.weight(s.numbers(D, D), "w"), out=s.output("y"))
    return of_model(Model.load(s.save(tmp_path / "m.onnx")), feeds, joined=joined)


def of_model(model: Model, feeds, *, joined: bool) -> Batches:
    given = Feeds.of(feeds)
    student = Student(model, model.copy(), ["w"], Context(given, given))
    student.move_to({"w": np.ones((D, D), np.float32)})
    return Batches(model, given, student, "cpu", vary=joined)


def rows_of(*lengths: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"ids": random.integers(0, WORDS, (1, length))} for length in lengths]


def test_joined_texts_take_the_frame_of_the_first(tmp_path):
    feeds = rows_of(20, 24, 30, 20, 41, 24)
    made = batches(tmp_path, feeds, joined=True)
    steps = list(made.of_epoch(np.random.default_rng(0)))
    assert (made.together, made.stacked, len(made), len(steps)) == (4, True, 2, 2)
    assert [len(step) for step in steps] == [1, 1]
    assert [step[0]["ids"].shape[0] for step in steps] == [4, 2]
    assert {step[0]["ids"].shape[1] for step in steps} <= {20, 24, 30, 41}
    assert len({row.tobytes() for row in steps[0][0]["ids"]}) == 4


def test_feeds_of_one_shape_are_put_together(tmp_path):
    feeds = rows_of(20, 20, 24, 20)
    [step] = batches(tmp_path, feeds, joined=False).of_epoch(np.random.default_rng(0))
    assert sorted(feed["ids"].shape for feed in step) == [(1, 24), (3, 20)]
    assert {row.tobytes() for feed in step for row in feed["ids"]} == {feed["ids"].tobytes() for feed in feeds}


@pytest.mark.parametrize("how", [{"rows": 1}, {"fixed": True}])
def test_a_model_of_one_row_gets_one_row(tmp_path, how):
    made = batches(tmp_path, rows_of(20, 20, 20, 20), joined=False, **how)
    [step] = made.of_epoch(np.random.default_rng(0))
    assert not made.stacked
    assert [feed["ids"].shape for feed in step] == [(1, 20)] * 4


def test_texts_that_see_each_other_stay_alone(tmp_path):
    s = Sketch()
    ids = s.input("ids", ["batch", "tokens"], TensorProto.INT64)
    x = s.op("Gather", s.weight(s.numbers(WORDS, D)), ids)
    x = s.op("Add", x, s.op("ReduceMean", x, axes=[0], keepdims=1))
    s.op("MatMul", x, s.weight(s.numbers(D, D), "w"), out=s.output("y"))
    assert not of_model(Model.load(s.save(tmp_path / "m.onnx")), rows_of(20, 20, 20, 20), joined=False).stacked


def test_the_gradient_of_a_step_is_that_of_its_rows_one_by_one(tmp_path):
    made = batches(tmp_path, rows_of(20, 20, 24, 20), joined=False)
    model = Model.load(tmp_path / "m.onnx")
    start = {"w": np.ones((D, D), np.float32)}
    student = Student(model, model.copy(), ["w"], Context())
    [step] = made.of_epoch(np.random.default_rng(0))
    found = []
    for feeds in (step, rows_of(20, 20, 24, 20)):
        student.move_to(start)
        rows = sum(len(feed["ids"]) for feed in feeds)
        for feed in feeds:
            student.add(feed, len(feed["ids"]) / rows)
        found.append(to_array(student.gradient()["w"]).copy())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-5 * np.abs(found[1]).max())


def test_other_inputs_beside_texts_are_all_seen(tmp_path):
    s = Sketch()
    x = s.op("Gather", s.weight(s.numbers(WORDS, D)), s.input("ids", ["batch", "tokens"], TensorProto.INT64))
    x = s.op("Add", x, s.op("Unsqueeze", s.input("beside", ["batch", D]), s.weight(np.array([1]))))
    s.op("MatMul", x, s.weight(s.numbers(D, D), "w"), out=s.output("y"))
    feeds = [{**feed, "beside": np.full((1, D), number, np.float32)} for number, feed in enumerate(rows_of(*[20] * 8))]
    made = of_model(Model.load(s.save(tmp_path / "m.onnx")), feeds, joined=True)
    assert made.stacked
    seen = np.concatenate([feed["beside"][:, 0] for step in made.of_epoch(np.random.default_rng(0)) for feed in step])
    assert sorted(seen) == list(range(8))
