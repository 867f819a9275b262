"""What the exact passes add to a bias: never to one that the caller gives, never so that the file grows."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan

D = 8
X = {"x": np.random.default_rng(3).normal(size=(2, 5, D)).astype(np.float32)}


def shifted(kind: str) -> tuple[Sketch, str]:
    """Something with a constant added, to be folded into the linears behind it."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    return s, s.norm(x, D) if kind == "fold-norm" else s.op("Add", x, s.weight(s.numbers(D)))


def apply(s: Sketch, folder, kind: str) -> tuple[Model, int]:
    s.save(folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse([kind]), threads=1)
    return model, result.fired


@pytest.mark.parametrize("kind", ["fold-bias", "fold-norm"])
def test_a_bias_that_the_caller_may_override_takes_nothing(tmp_path, kind):
    s, normed = shifted(kind)
    s.weight(s.numbers(6), "bias")
    s.input("bias", [6])
    s.op("Add", s.op("MatMul", normed, s.weight(s.numbers(D, 6))), "bias", out=s.output("y"))
    model, fired = apply(s, tmp_path, kind)
    assert fired == 0
    feed = {**X, "bias": np.ones(6, np.float32)}
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


@pytest.mark.parametrize("kind", ["fold-bias", "fold-norm"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_bias_takes_nothing_where_the_file_would_grow(tmp_path, kind, shared):
    s, normed = shifted(kind)
    bias = s.weight(s.numbers(64))
    parts = [s.op("Add", s.op("MatMul", normed, s.weight(s.numbers(D, 64))), bias if shared else s.weight(s.numbers(64)))
             for _ in range(2)]
    s.op("Concat", *parts, out=s.output("y"), axis=-1)
    model, fired = apply(s, tmp_path, kind)
    assert fired == (0 if shared else 1)
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


@pytest.mark.parametrize(("rows", "folds"), [(["rows", D], 0), (["batch", "tokens", D], 1)])
def test_a_bias_keeps_its_axes(tmp_path, rows, folds):
    """A bias of three axes makes the result of a product of two have three: it is no bias then."""
    s = Sketch()
    x = s.input("x", rows)
    product = s.op("MatMul", s.op("Add", x, s.weight(s.numbers(D))), s.weight(s.numbers(D, 6)))
    s.op("Add", product, s.weight(s.numbers(1, 1, 6)), out=s.output("y"))
    model, fired = apply(s, tmp_path, "fold-bias")
    assert fired == folds
    feed = {"x": X["x"] if len(rows) == 3 else X["x"][0]}
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6
