"""fuse-matmul: which matrices in a row become one, and which must stay two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from rewriting import Branch, feeds_of, in_branch, rewrite

D, BETWEEN, OUT = 8, 32, 6
[X] = feeds_of((2, 5, D))
[ROWS] = feeds_of((10, D))


def sketch(dtype: type = np.float32, opset: int = 17) -> tuple[Sketch, str]:
    s = Sketch(opset, dtype=dtype)
    return s, s.input("x", ["batch", "tokens", D])


def fuse(s: Sketch, folder: Path, feed=X, tolerance: float = 1e-6) -> tuple[Model, PassResult]:
    """fuse-matmul on its own: nothing moves beyond rounding, and no weight is added."""
    model, [result] = rewrite(s, folder, "fuse-matmul")
    assert drift(run(s.model(), feed), run(folder / "after.onnx", feed)) < tolerance
    weights = [sum(each._values.nbytes for _, graph in source.graphs() for each in graph.constants)
               for source in (Model.load(folder / "before.onnx"), model)]
    assert weights[1] <= weights[0]
    return model, result


def stays(s: Sketch, folder: Path, words: str | None = None, feed=X) -> None:
    """Nothing fires; ``words`` are in the reason, or there is none."""
    model, result = fuse(s, folder, feed)
    assert result.fired == 0
    assert ops(model) == ops(s.model())
    assert [words in each.reason for each in result.refused] == ([] if words is None else [True])


def matrices(model: Model) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in model.graph.constants if len(each.shape) == 2]


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
def test_two_matrices_become_one(tmp_path, biases):
    s, x = sketch()
    s.op("Identity", s.linear(s.linear(x, D, BETWEEN, bias=biases[0]), BETWEEN, OUT, bias=biases[1]), out=s.output("y"))
    model, result = fuse(s, tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", *(["Add"] if any(biases) else []), "Identity"]
    assert matrices(model) == [(D, OUT)]


def test_what_makes_an_output_keeps_its_name(tmp_path):
    s, x = sketch()
    s.op("MatMul", s.linear(x, D, BETWEEN), s.weight(s.numbers(BETWEEN, OUT)), out=s.output("y"))
    model, _ = fuse(s, tmp_path)
    assert ops(model) == ["MatMul", "Add"]


def test_numbers_for_each_feature_may_lie_between(tmp_path):
    s, x = sketch()
    value = s.linear(x, D, BETWEEN)
    for op, numbers in (("Mul", s.numbers(BETWEEN)), ("Sub", s.numbers(BETWEEN)), ("Div", 2 + np.abs(s.numbers(BETWEEN))),
                        ("Add", s.numbers(BETWEEN)), ("Mul", np.asarray(0.5, np.float32))):
        value = s.op(op, value, s.weight(numbers))
    value = s.op("Mul", s.weight(s.numbers(BETWEEN)), s.op("Identity", value))
    s.op("Identity", s.linear(value, BETWEEN, OUT), out=s.output("y"))
    model, result = fuse(s, tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Add", "Identity"]


@pytest.mark.parametrize("op", ["Sub", "Div"])
def test_a_constant_from_which_is_taken_stays(tmp_path, op):
    s, x = sketch()
    turned = s.op(op, s.weight(s.numbers(BETWEEN)), s.linear(x, D, BETWEEN))
    s.op("Identity", s.linear(turned, BETWEEN, OUT), out=s.output("y"))
    stays(s, tmp_path)


def test_three_in_a_row_become_one(tmp_path):
    s, x = sketch()
    value = s.linear(s.linear(s.linear(x, D, BETWEEN), BETWEEN, BETWEEN), BETWEEN, OUT)
    s.op("Identity", value, out=s.output("y"))
    model, result = fuse(s, tmp_path)
    assert result.fired == 2
    assert matrices(model) == [(D, OUT)]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemms(tmp_path, transposed):
    s = Sketch()
    x = s.input("x", ["rows", D])
    for d_in, d_out in ((D, BETWEEN), (BETWEEN, OUT)):
        weight = s.numbers(d_out, d_in) if transposed else s.numbers(d_in, d_out)
        x = s.op("Gemm", x, s.weight(weight), s.weight(s.numbers(d_out)), transB=transposed, alpha=0.5)
    s.op("Identity", x, out=s.output("y"))
    model, result = fuse(s, tmp_path, ROWS)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Add", "Identity"]


def test_a_matrix_that_two_pairs_end_in(tmp_path):
    """Both products read it: it is gone only when both are fused, and the sum of both is no larger."""
    s, x = sketch()
    shared = s.weight(s.numbers(BETWEEN, OUT))
    parts = [s.op("MatMul", s.linear(value, D, BETWEEN), shared) for value in (x, s.op("Relu", x))]
    s.op("Add", *parts, out=s.output("y"))
    model, result = fuse(s, tmp_path)
    assert result.fired == 2
    assert matrices(model) == [(D, OUT)] * 2


def test_what_linearize_ffn_leaves_becomes_one_matrix(tmp_path):
    feeds = feeds_of((2, 5, D), 6, seed=11)
    lines, _ = rewrite(transformer(2), tmp_path, "linearize-ffn:fit=neuron", fit=feeds)
    before = run(lines, X)
    model, results = rewrite(transformer(2), tmp_path, "linearize-ffn:fit=neuron", "fuse-matmul", fit=feeds)
    assert [result.fired for result in results] == [2, 2]
    assert len(find_ffn_blocks(model)) == 0
    assert matrices(model) == [(D, D)] * 2
    assert drift(before, run(model, X)) < 1e-5


def test_a_bottleneck_stays(tmp_path):
    """LoRA: two thin matrices cost less than one."""
    s, x = sketch()
    s.op("Identity", s.linear(s.linear(x, D, 2), 2, D), out=s.output("y"))
    stays(s, tmp_path)


def test_a_product_that_costs_the_same_stays(tmp_path):
    s, x = sketch()
    s.op("Identity", s.linear(s.linear(x, D, 4), 4, D), out=s.output("y"))
    stays(s, tmp_path)


@pytest.mark.parametrize("between", ["Relu", "Softmax", "Identity twice read"])
def test_what_lies_between_must_be_constants_alone(tmp_path, between):
    s, x = sketch()
    value = s.linear(x, D, BETWEEN)
    if between == "Identity twice read":
        value = s.op("Mul", value, s.op("Identity", value))
    else:
        value = s.op(between, value)
    s.op("Identity", s.linear(value, BETWEEN, OUT), out=s.output("y"))
    stays(s, tmp_path)


@pytest.mark.parametrize("place", ["product", "sum"])
def test_a_value_between_that_is_an_output_stays(tmp_path, place):
    s, x = sketch()
    product = s.op("MatMul", x, s.weight(s.numbers(D, BETWEEN)), out="product")
    value = s.op("Add", product, s.weight(s.numbers(BETWEEN)), out="sum")
    s.output(place)
    s.op("Identity", s.linear(value, BETWEEN, OUT), out=s.output("y"))
    stays(s, tmp_path)


def test_a_product_without_its_bias_that_is_an_output_stays(tmp_path):
    s, x = sketch()
    product = s.op("MatMul", s.linear(x, D, BETWEEN), s.weight(s.numbers(BETWEEN, OUT)), out=s.output("product"))
    s.op("Add", product, s.weight(s.numbers(OUT)), out=s.output("y"))
    stays(s, tmp_path)


def test_a_value_between_that_something_else_reads_stays(tmp_path):
    s, x = sketch()
    value = s.linear(x, D, BETWEEN)
    s.op("ReduceMean", value, out=s.output("probe"))
    s.op("Identity", s.linear(value, BETWEEN, OUT), out=s.output("y"))
    stays(s, tmp_path)


def test_a_value_between_that_two_linears_read_stays(tmp_path):
    s, x = sketch()
    value = s.linear(x, D, BETWEEN)
    s.op("Mul", s.linear(value, BETWEEN, OUT), s.linear(value, BETWEEN, OUT), out=s.output("y"))
    stays(s, tmp_path)


def test_a_matrix_that_something_else_reads_stays(tmp_path):
    s, x = sketch()
    first, second = s.weight(s.numbers(D, BETWEEN)), s.weight(s.numbers(BETWEEN, OUT))
    y = s.op("MatMul", s.op("MatMul", x, first), second)
    s.op("Relu", first, out=s.output("a"))
    s.op("Relu", second, out=s.output("b"))
    s.op("Identity", y, out=s.output("y"))
    stays(s, tmp_path, "would grow")


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_matrix_that_the_caller_may_override_stays(tmp_path, which):
    s, x = sketch()
    first, second = s.weight(s.numbers(D, BETWEEN), "first"), s.weight(s.numbers(BETWEEN, OUT), "second")
    s.input(which, [D, BETWEEN] if which == "first" else [BETWEEN, OUT])
    s.op("MatMul", s.op("MatMul", x, first), second, out=s.output("y"))
    stays(s, tmp_path, "override")


def test_a_scale_that_the_caller_may_override_stays(tmp_path):
    s, x = sketch()
    s.input(s.weight(s.numbers(BETWEEN), "scale"), [BETWEEN])
    s.op("Identity", s.linear(s.op("Mul", s.linear(x, D, BETWEEN), "scale"), BETWEEN, OUT), out=s.output("y"))
    stays(s, tmp_path)


def test_a_quantized_matrix_stays(tmp_path):
    s, x = sketch(opset=21)
    weight = s.op("DequantizeLinear", s.weight(np.ones((D, BETWEEN), np.int8)), s.number(0.1))
    s.op("Identity", s.linear(s.op("MatMul", x, weight), BETWEEN, OUT), out=s.output("y"))
    stays(s, tmp_path, "quantized")


def test_packed_experts_stay(tmp_path):
    s, x = sketch()
    s.op("MatMul", s.op("MatMul", x, s.weight(s.numbers(2, D, BETWEEN))), s.weight(s.numbers(2, BETWEEN, OUT)),
         out=s.output("y"))
    stays(s, tmp_path)


def test_half_precision(tmp_path):
    s, x = sketch(np.float16)
    s.op("Identity", s.linear(s.linear(x, D, BETWEEN), BETWEEN, OUT), out=s.output("y"))
    model, result = fuse(s, tmp_path, {"x": X["x"].astype(np.float16)}, tolerance=5e-3)
    assert result.fired == 1
    assert {each.dtype for each in model.graph.constants} == {np.dtype(np.float16)}


def test_inside_an_if(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.linear(inner.linear("x", D, BETWEEN), BETWEEN, D), ["batch", "tokens", D])
    model, result = fuse(s, tmp_path, {**X, "wanted": np.asarray(True)})
    assert result.fired == 1
    assert [node.op for _, graph in model.graphs() for node in graph.nodes].count("MatMul") == 1


def test_a_pair_across_the_border_of_an_inner_graph_stays(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.linear("between", BETWEEN, D), ["batch", "tokens", D])
    s.op("MatMul", "x", s.weight(s.numbers(D, BETWEEN)), out="between")
    s.nodes.sort(key=lambda node: node.op_type == "If")
    stays(s, tmp_path, feed={**X, "wanted": np.asarray(True)})


@pytest.mark.parametrize("shape", [(1, 1, BETWEEN), (1, 1, 1)])
@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_a_constant_that_adds_an_axis_stays(tmp_path, op, shape):
    s = Sketch()
    between = s.op(op, s.op("MatMul", s.input("x", ["rows", D]), s.weight(s.numbers(D, BETWEEN))), s.weight(s.numbers(*shape)))
    s.op("MatMul", between, s.weight(s.numbers(BETWEEN, OUT)), out=s.output("y"))
    stays(s, tmp_path, None, ROWS)


@pytest.mark.parametrize(("scale", "dtype", "words"), [(1e25, np.float32, "too large"), (1e-25, np.float32, "too small"),
                                                       (1e3, np.float16, "too large"), (np.nan, np.float32, "too large")])
def test_a_product_that_does_not_fit_its_type_is_refused(tmp_path, scale, dtype, words):
    s, x = sketch(dtype)
    small = s.op("Mul", x, s.number(1 / scale if scale > 1 else 1))
    s.op("MatMul", s.op("MatMul", small, s.weight(s.numbers(D, BETWEEN, scale=scale))),
         s.weight(s.numbers(BETWEEN, OUT, scale=scale)), out=s.output("y"))
    onnx.save_model(s.model(), tmp_path / "m.onnx")
    model = Model.load(tmp_path / "m.onnx")
    [result] = run_plan(model, Plan.parse(["fuse-matmul"]), threads=1)
    assert result.fired == 0
    assert [words in each.reason for each in result.refused] == [True]
