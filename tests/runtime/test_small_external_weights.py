"""Sessions of models whose small weights (under 1 KB) are external too.

ONNX Runtime reads shapes and axes while it loads, and refuses them in external data; a ``Model`` hands them over inside.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import open_session
from rewriting import Branch, feeds_of, in_branch

[X] = feeds_of((2, 5, 8))
EVERYTHING = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0, "convert_attribute": True}


def shaped() -> Sketch:
    """Its shapes and axes are initializers of 8 to 24 bytes, its biases of 32, its matrices of more than 1 KB."""
    s = Sketch(18)
    x = s.input("x", ["batch", "tokens", 8])
    rows = s.op("Reshape", x, s.weight(np.asarray([-1, 8])))
    hidden = s.op("Relu", s.linear(rows, 8, 64), out="hidden")
    y = s.op("Reshape", s.linear(hidden, 64, 8), s.weight(np.asarray([2, -1, 8])))
    s.op("Squeeze", s.op("Unsqueeze", y, s.weight(np.asarray([0]))), s.weight(np.asarray([0])), out=s.output("y"))
    return s


def saved(s: Sketch, folder) -> Model:
    """Read back with every weight outside, however small."""
    path = s.save(folder / "model.onnx", **EVERYTHING)
    stored = onnx.load(path, load_external_data=False)
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in stored.graph.initializer)
    return Model.load(path)


def test_small_weights_travel_in_the_bytes_and_large_ones_beside_them(tmp_path):
    s = shaped()
    data, large = saved(s, tmp_path).session_parts()
    inside = {tensor.name: tensor for tensor in onnx.ModelProto.FromString(data).graph.initializer}
    arrays = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in s.initializers.items()}
    assert set(inside) == set(arrays)
    assert set(large) == {name for name, array in arrays.items() if array.nbytes >= 1024}
    assert large
    for name in set(arrays) - set(large):
        assert inside[name].data_location != onnx.TensorProto.EXTERNAL
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(inside[name]), arrays[name])


@pytest.mark.parametrize("optimize", [True, False])
def test_the_session_gives_what_the_model_gives(tmp_path, optimize):
    s = shaped()
    session = open_session(saved(s, tmp_path), threads=1, optimize=optimize)
    assert drift(run(s.model(), X), session.run(X)) < 1e-6


def test_values_inside_can_be_asked_for(tmp_path):
    s = shaped()
    hidden = open_session(saved(s, tmp_path), outputs=["hidden"], only=True).run(X)["hidden"]
    assert hidden.shape == (10, 64)
    s.output("hidden")
    np.testing.assert_allclose(hidden, run(s.model(), X, ["hidden"])["hidden"], rtol=1e-5, atol=1e-6)


def test_small_weights_inside_an_if_and_in_constant_nodes(tmp_path):
    inner = Branch()
    axis = inner.op("Constant", value=onnx.numpy_helper.from_array(np.asarray([-1, 8])))
    flat = inner.op("Reshape", inner.linear("x", 8, 8), axis)
    back = inner.op("Reshape", flat, inner.weight(np.asarray([2, 5, 8])))
    s = in_branch(inner, back, [2, 5, 8])
    path = s.save(tmp_path / "model.onnx", **EVERYTHING)
    feed = {**X, "wanted": np.asarray(True)}
    assert drift(run(s.model(), feed), open_session(Model.load(path)).run(feed)) < 1e-6


def test_a_plan_runs_on_such_a_model(tmp_path):
    s = transformer(2, activation="gelu")
    model = saved(s, tmp_path)
    results = run_plan(model, Plan.parse(["fold-norm", "quantize-ffn"]), threads=1)
    assert [result.fired for result in results] == [2, 2]
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out" / "model.onnx")
    assert 0 < drift(run(s.model(), X), run(tmp_path / "out" / "model.onnx", X)) < 0.05
