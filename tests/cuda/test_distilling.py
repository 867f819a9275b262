"""The way down on CUDA is that of the CPU: gradients, steps, and what they come to."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import transformer
from ffnfold.graph.model import Model
from ffnfold.passes.base import Context
from ffnfold.passes.distilling.batches import Batches
from ffnfold.passes.distilling.descent import descend
from ffnfold.passes.distilling.steps import Steps
from ffnfold.passes.distilling.student import Student
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from ffnfold.runtime.ort_values import device_value, to_array
from onnx import TensorProto
from rewriting import feeds_of

D = 16
FIT, CHOOSE = Feeds.of(feeds_of((1, 6, D), 24, seed=11)), Feeds.of(feeds_of((1, 6, D), 4, seed=12))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model with its neurons cut, the original, and the weights that the original does not have."""
    path = transformer(3, D, 64, gated=True, activation="silu").save(tmp_path_factory.mktemp("models") / "model.onnx")
    original, model = Model.load(path), Model.load(path)
    run_plan(model, Plan.parse(["slim-ffn:keep=0.25,multiple=1,refine=0,affine=false"]), fit=FIT, choose=CHOOSE)
    known = {tensor.name for node in original.graph.nodes for tensor in node.inputs}
    weights = {tensor.name: tensor._values.load() for node in model.graph.nodes for tensor in node.inputs
               if hasattr(tensor, "_values") and tensor.name not in known and tensor.dtype == np.float32}
    return model, original, weights


@pytest.mark.cuda
def test_gradients(pair, provider):
    model, original, weights = pair
    found = {}
    for where in ("cpu", provider):
        student = Student(model, original, list(weights), Context(FIT, CHOOSE, where))
        student.move_to(weights)
        for feed in FIT[:3]:
            student.add(feed)
        found[where] = {name: np.array(to_array(value)) for name, value in student.gradient().items()}
    assert found["cpu"]
    for name, here in found["cpu"].items():
        np.testing.assert_allclose(found[provider][name], here, atol=5e-3 * np.abs(here).max())  # TF32 has 10 bits


@pytest.mark.cuda
def test_steps(provider):
    random = np.random.default_rng(0)
    start = {"w": random.standard_normal((5, 7)).astype(np.float32)}
    states = []
    for where in ("cpu", provider):
        steps = Steps(start, {}, Context(FIT, CHOOSE, where))
        for seed in range(3):
            gradient = np.random.default_rng(seed).standard_normal((5, 7)).astype(np.float32)
            assert steps.step({"w": device_value(gradient, TensorProto.FLOAT, where)}, {"w": 0.01})
        states.append(steps.state())
    for key, here in states[0].items():
        np.testing.assert_allclose(states[1][key], here, rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_a_descent(pair, provider):
    model, original, weights = pair
    found = []
    for where in ("cpu", provider):
        context = Context(FIT, CHOOSE, where)
        student = Student(model, original, list(weights), context)
        student.move_to(weights)
        assert Batches(model, FIT, student, where, vary=True).stacked
        found.append(descend(student, weights, model, context, epochs=8, rate=0.01, vary=True, progress=lambda message: None))
    here, there = found
    assert there.after < 0.95 * there.before
    np.testing.assert_allclose([there.before, there.after], [here.before, here.after], rtol=0.05)
