"""merge-linears: which linears are put into one when told to, and that they are left alone when not."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, optimized_ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan

D = 8
X = {"x": np.random.default_rng(7).normal(size=(2, 5, D)).astype(np.float32)}


def merge(s: Sketch, folder: Path, options: str = ":force=true") -> tuple[Model, PassResult]:
    """The model after merge-linears, read back from the file it was written to."""
    s.save(folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse([f"merge-linears{options}"]), threads=1)
    model.save(folder / "merged.onnx")
    return Model.load(folder / "merged.onnx"), result


def sketch(opset: int = 17, width: int = D) -> tuple[Sketch, str]:
    s = Sketch(opset)
    return s, s.input("x", ["batch", "tokens", width])


def gate_and_up(s: Sketch, x: str, *, bias: bool = False, widths: tuple[int, int] = (32, 32)) -> str:
    gate, up = s.linear(x, D, widths[0], bias=bias), s.linear(x, D, widths[1], bias=bias)
    return s.op("Concat", s.op("Tanh", gate), s.op("Sin", up), out=s.output("y"), axis=-1)


def check(s: Sketch, model: Model, feed: dict = X) -> None:
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 21])
@pytest.mark.parametrize("widths", [(32, 32), (32, 8)])
@pytest.mark.parametrize("bias", [False, True])
def test_two_linears_become_one_and_a_split(tmp_path, opset, widths, bias):
    s, x = sketch(opset)
    gate_and_up(s, x, bias=bias, widths=widths)
    model, result = merge(s, tmp_path)
    assert result.fired == 1
    assert (ops(model).count("MatMul"), ops(model).count("Add"), ops(model).count("Split")) == (1, int(bias), 1)
    names = 256
    assert (tmp_path / "merged.onnx").stat().st_size <= (tmp_path / "model.onnx").stat().st_size + names
    executed = [len(optimized_ops(tmp_path / f"{name}.onnx", tmp_path)) for name in ("model", "merged")]
    assert executed[1] <= executed[0]
    check(s, model)


def test_nothing_is_merged_without_force(tmp_path):
    s, x = sketch()
    gate_and_up(s, x)
    model, result = merge(s, tmp_path, "")
    assert result.fired == 0
    assert "not measured to be faster" in result.refused[0].reason
    assert result.refused[0].value == "x"
    assert "Split" not in ops(model)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemms(tmp_path, transposed):
    s = Sketch()
    x = s.input("x", ["rows", D])
    shape = (6, D) if transposed else (D, 6)
    parts = [s.op("Gemm", x, s.weight(s.numbers(*shape)), s.weight(s.numbers(6)), transB=transposed) for _ in range(3)]
    s.op("Max", *parts, out=s.output("y"))
    model, result = merge(s, tmp_path)
    assert (result.fired, ops(model).count("Gemm")) == (1, 1)
    check(s, model, {"x": X["x"][0]})


def test_an_output_of_the_graph_keeps_its_name(tmp_path):
    s, x = sketch()
    s.op("MatMul", x, s.weight(s.numbers(D, 6)), out=s.output("a"))
    s.op("MatMul", x, s.weight(s.numbers(D, 4)), out=s.output("b"))
    model, result = merge(s, tmp_path)
    assert result.fired == 1
    check(s, model)


def test_weights_pass_through_bit_for_bit(tmp_path):
    s = Sketch(dtype=ml_dtypes.bfloat16)
    x = s.input("x", ["rows", D])
    first, second = s.numbers(D, 6), s.numbers(D, 4)
    s.op("MatMul", x, s.weight(onnx.numpy_helper.from_array(first, "first"), "first"), out=s.output("a"))
    s.op("MatMul", x, s.weight(onnx.numpy_helper.from_array(second, "second"), "second"), out=s.output("b"))
    s.save(tmp_path / "model.onnx")
    model = Model.load(tmp_path / "model.onnx")
    from ffnfold.passes.merge_linears import _groups, _merge  # ONNX Runtime has no such MatMul, so it cannot be asked

    [group] = _groups(model, model.graph)
    _merge(model, model.graph, group)
    [node] = [node for node in model.graph.nodes if node.op == "MatMul"]
    assert node.inputs[1]._values.load().tobytes() == np.concatenate([first, second], axis=1).tobytes()


def test_a_weight_that_another_node_reads_stays(tmp_path):
    s, x = sketch()
    weight = s.weight(s.numbers(D, D))
    s.op("Concat", s.op("MatMul", x, weight), s.op("MatMul", x, s.weight(s.numbers(D, D))), out=s.output("y"), axis=-1)
    s.op("Neg", weight, out=s.output("w"))
    model, result = merge(s, tmp_path)
    assert result.fired == 0
    assert ops(model).count("MatMul") == 2


def test_tied_weights_stay_tied(tmp_path):
    s, x = sketch()
    weight = s.weight(s.numbers(D, D))
    s.op("Concat", s.op("MatMul", x, weight), s.op("MatMul", s.op("Neg", x), weight),
         s.op("MatMul", x, s.weight(s.numbers(D, D))), out=s.output("y"), axis=-1)
    _, result = merge(s, tmp_path)
    assert result.fired == 0


def test_a_weight_that_the_caller_may_override_stays(tmp_path):
    s, x = sketch()
    s.weight(s.numbers(D, D), "w")
    s.input("w", [D, D])
    s.op("Concat", s.op("MatMul", x, "w"), s.op("MatMul", x, s.weight(s.numbers(D, D))), out=s.output("y"), axis=-1)
    _, result = merge(s, tmp_path)
    assert result.fired == 0


def test_weights_stored_in_fewer_bits_stay(tmp_path):
    s, x = sketch()
    weights = [s.op("Cast", s.weight(s.numbers(D, 6).astype(np.float16)), to=onnx.TensorProto.FLOAT) for _ in range(2)]
    s.op("Concat", *(s.op("MatMul", x, weight) for weight in weights), out=s.output("y"), axis=-1)
    _, result = merge(s, tmp_path)
    assert result.fired == 0


def test_a_product_that_is_an_output_without_its_bias_stays(tmp_path):
    s, x = sketch()
    gate_and_up(s, x, bias=True)
    product = next(node.output[0] for node in s.nodes if node.op_type == "MatMul")
    s.output(product)
    model, result = merge(s, tmp_path)
    assert result.fired == 0
    check(s, model)


def test_linears_of_different_values_stay(tmp_path):
    s, x = sketch()
    s.op("Concat", s.op("MatMul", x, s.weight(s.numbers(D, 6))), s.op("MatMul", s.op("Neg", x), s.weight(s.numbers(D, 6))),
         out=s.output("y"), axis=-1)
    _, result = merge(s, tmp_path)
    assert result.fired == 0


def test_a_bias_that_onnx_runtime_fuses_with_its_activation_stays(tmp_path):
    s, x = sketch(20)
    gate, up = s.linear(x, D, 32), s.linear(x, D, 32)
    s.op("Mul", s.op("Gelu", gate), up, out=s.output("y"))
    s.save(tmp_path / "before.onnx")
    assert "BiasGelu" in optimized_ops(tmp_path / "before.onnx", tmp_path)
    model, result = merge(s, tmp_path)
    assert result.fired == 0
    assert "lose a fusion" in result.refused[0].reason
    assert "Gelu" in result.refused[0].reason
    assert "Split" not in ops(model)


def test_linears_inside_a_branch_are_merged(tmp_path):
    s, x = sketch()
    inner = Sketch()
    inner.initializers = {}
    gate = inner.op("MatMul", x, inner.weight(inner.numbers(D, 6), "inner_gate"), out="g")
    up = inner.op("MatMul", x, inner.weight(inner.numbers(D, 6), "inner_up"), out="u")
    inner.op("Mul", gate, up, out=inner.output("then_y", None))
    other = Sketch()
    other.op("MatMul", x, other.weight(other.numbers(D, 6), "other_weight"), out=other.output("else_y", None))
    condition = s.input("condition", [], onnx.TensorProto.BOOL)
    s.op("If", condition, out=s.output("y"), then_branch=inner.graph("then"), else_branch=other.graph("else"))
    model, result = merge(s, tmp_path)
    assert result.fired == 1
    for value in (True, False):
        check(s, model, {**X, "condition": np.asarray(value)})
