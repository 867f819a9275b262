"""dedupe-weights: which weights are shared, and which must not be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from ffn_graphs import Sketch, drift, ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from onnx import TensorProto, helper, numpy_helper

X = {"x": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}


def dedupe(source: Sketch, folder: Path) -> tuple[Model, PassResult]:
    """The model after dedupe-weights, read back from the file it was written to."""
    onnx.save_model(source.model(), folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse(["dedupe-weights"]), threads=1)
    model.save(folder / "smaller.onnx")
    return Model.load(folder / "smaller.onnx"), result


def two_matmuls(first: np.ndarray, second: np.ndarray) -> Sketch:
    s = Sketch()
    hidden = s.op("MatMul", s.input("x", ["rows", first.shape[0]]), s.weight(first, "first"))
    s.op("MatMul", hidden, s.weight(second, "second"), out=s.output("y"))
    return s


def weights(model: Model) -> set[str]:
    return {tensor.name for tensor in model.proto.graph.initializer}


def test_equal_weights_are_stored_once(tmp_path):
    w = Sketch().numbers(4, 4)
    s = two_matmuls(w, w.copy())
    model, result = dedupe(s, tmp_path)
    assert weights(model) == {"first"}
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) == 0


def test_large_weights_are_compared_to_the_last_byte(tmp_path):
    w = Sketch().numbers(64, 64)
    other = w.copy()
    other[-1, -1] += 1e-6
    model, result = dedupe(two_matmuls(w, other), tmp_path)
    assert weights(model) == {"first", "second"}
    assert result.fired == 0
    model, result = dedupe(two_matmuls(w, w.copy()), tmp_path)
    assert weights(model) == {"first"}


def test_minus_zero_is_not_zero(tmp_path):
    w = np.zeros((4, 4), np.float32)
    model, _ = dedupe(two_matmuls(w, -w), tmp_path)
    assert weights(model) == {"first", "second"}


def test_equal_bytes_of_another_shape_or_type_stay(tmp_path):
    s = Sketch()
    x = s.input("x", [2, 4])
    y = s.op("Add", x, s.weight(np.zeros(4, np.float32), "row"))
    y = s.op("Add", y, s.weight(np.zeros((1, 4), np.float32), "matrix"))
    s.op("Gather", y, s.weight(np.zeros(4, np.int32), "indices"), out=s.output("y"), axis=1)
    model, result = dedupe(s, tmp_path)
    assert weights(model) == {"row", "matrix", "indices"}
    assert result.fired == 0


def test_a_default_that_the_caller_may_override_stays(tmp_path):
    w = Sketch().numbers(4, 4)
    s = two_matmuls(w, w.copy())
    s.input("second", [4, 4])
    model, result = dedupe(s, tmp_path)
    assert weights(model) == {"first", "second"}
    assert result.fired == 0
    feed = {**X, "second": np.eye(4, dtype=np.float32)}
    assert drift(run(s.model(), feed), run(model, feed)) == 0


def test_an_output_keeps_its_name_and_serves_the_others(tmp_path):
    w = Sketch().numbers(4, 4)
    s = two_matmuls(w, w.copy())
    s.output("second", [4, 4])
    model, result = dedupe(s, tmp_path)
    assert weights(model) == {"second"}
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) == 0


def test_constant_nodes_count(tmp_path):
    w = numpy_helper.from_array(Sketch().numbers(4, 4))
    s = Sketch()
    hidden = s.op("MatMul", s.input("x", [2, 4]), s.op("Constant", value=w))
    s.op("MatMul", hidden, s.op("Constant", value=w), out=s.output("y"))
    model, _ = dedupe(s, tmp_path)
    assert sorted(ops(model)) == ["Constant", "MatMul", "MatMul"]
    assert drift(run(s.model(), X), run(model, X)) == 0


def branches(names: tuple[str, str], outer: np.ndarray | None) -> Sketch:
    s = Sketch()
    x = s.input("x", [2, 4])
    flag = s.input("flag", [], TensorProto.BOOL)
    w = Sketch().numbers(4, 4)
    inner = [helper.make_graph(
        [helper.make_node("MatMul", ["hidden", name], [f"{name}_y"])], name, [],
        [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [2, 4])], [numpy_helper.from_array(w, name)])
        for name in names]
    s.op("MatMul", x, s.weight(w if outer is None else outer, "outer"), out="hidden")
    s.op("If", flag, out=s.output("y", [2, 4]), then_branch=inner[0], else_branch=inner[1])
    return s


def test_a_branch_reads_the_twin_of_the_graph_around_it(tmp_path):
    s = branches(("a", "b"), None)
    model, result = dedupe(s, tmp_path)
    assert result.fired == 2
    assert all(not graph.constants for path, graph in model.graphs() if path != "main")
    for flag in (True, False):
        feed = {**X, "flag": np.asarray(flag)}
        assert drift(run(s.model(), feed), run(model, feed)) == 0


def test_two_branches_do_not_read_each_others(tmp_path):
    model, result = dedupe(branches(("a", "b"), np.eye(4, dtype=np.float32)), tmp_path)
    assert result.fired == 0
    assert all(len(graph.constants) == 1 for path, graph in model.graphs() if path != "main")


def test_a_name_that_an_inner_graph_hides_is_not_shared(tmp_path):
    s = branches(("outer", "b"), None)  # the first branch calls its own weight as the outer one is called
    _, result = dedupe(s, tmp_path)
    assert result.fired == 0
    assert "means another value" in result.refused[0].reason


def test_bfloat16_and_int4_are_compared_as_stored(tmp_path):
    s = Sketch()
    packed = helper.make_tensor("a", TensorProto.INT4, [4, 4], list(range(-8, 8)))
    twin = helper.make_tensor("b", TensorProto.INT4, [4, 4], list(range(-8, 8)))
    x = s.input("x", [4, 4])
    scale = s.number(0.1)
    s.opset = 21
    parts = [s.op("DequantizeLinear", s.weight(tensor, tensor.name), scale) for tensor in (packed, twin)]
    s.op("Add", x, s.op("Add", *parts), out=s.output("y"))
    model, result = dedupe(s, tmp_path)
    assert result.fired == 1
    feed = {"x": np.ones((4, 4), np.float32)}
    assert drift(run(s.model(), feed), run(model, feed)) == 0
