"""fold-bias: which constant additions are folded, and which must stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, optimized_ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from onnx import TensorProto
from rewriting import Branch, feeds_of, in_branch, rewrite

D = 8
[X] = feeds_of((2, 5, D))
[ROWS] = feeds_of((10, D))
[IMAGE] = feeds_of((2, 3, 6, 6))


def sketch(shape=("batch", "tokens", D), opset: int = 17, dtype: type = np.float32) -> tuple[Sketch, str]:
    s = Sketch(opset, dtype=dtype)
    return s, s.input("x", list(shape))


def fold(s: Sketch, folder: Path, feed=X, tolerance: float = 1e-6) -> tuple[Model, PassResult]:
    """fold-bias on its own: nothing moves beyond rounding, and the file does not grow."""
    model, [result] = rewrite(s, folder, "fold-bias")
    assert drift(run(s.model(), feed), run(folder / "after.onnx", feed)) < tolerance
    weights = [sum(each._values.nbytes for _, graph in source.graphs() for each in graph.constants)
               for source in (Model.load(folder / "before.onnx"), model)]
    assert weights[1] <= weights[0]
    return model, result


def stays(s: Sketch, folder: Path, words: str | None = None, feed=X) -> None:
    """Nothing fires; ``words`` are in the reason, or there is none."""
    model, result = fold(s, folder, feed)
    assert result.fired == 0
    assert ops(model) == ops(s.model())
    if words is None:
        assert result.refused == []
    else:
        assert words in result.refused[0].reason


def test_two_additions_become_one(tmp_path):
    s, x = sketch()
    s.op("Add", s.op("Add", x, s.weight(s.numbers(D))), s.weight(s.numbers(D)), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    assert ops(model) == ["Add"]


def test_a_chain_of_additions_in_either_order_becomes_one(tmp_path):
    s, x = sketch()
    for turn in range(4):
        pair = (x, s.weight(s.numbers(D)))
        x = s.op("Add", *(pair if turn % 2 else pair[::-1]))
    s.op("Relu", x, out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 3
    assert ops(model) == ["Add", "Relu"]


def test_a_bias_ahead_of_a_linear_moves_behind_it(tmp_path):
    s, x = sketch()
    s.op("Identity", s.linear(s.op("Add", x, s.weight(s.numbers(D))), D, 6), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    assert ops(model) == ["MatMul", "Add", "Identity"]


def test_a_bias_ahead_of_several_linears_moves_behind_each(tmp_path):
    s, x = sketch()
    shifted = s.op("Add", x, s.weight(s.numbers(D)))
    s.op("Mul", s.linear(shifted, D, 6), s.linear(shifted, D, 6), out=s.output("y"))
    model, _ = fold(s, tmp_path)
    assert ops(model).count("Add") == 2


def test_a_number_ahead_of_a_linear_moves_behind_it(tmp_path):
    s, x = sketch()
    s.op("Identity", s.linear(s.op("Add", x, s.number(0.5)), D, 6), out=s.output("y"))
    assert ops(fold(s, tmp_path)[0]) == ["MatMul", "Add", "Identity"]


@pytest.mark.parametrize(("transposed", "alpha", "beta"), [(0, 1.0, 1.0), (1, 1.0, 1.0), (1, 0.5, 2.0)])
def test_a_gemm_takes_what_stands_before_and_behind_it(tmp_path, transposed, alpha, beta):
    s, x = sketch(("rows", D))
    weight = s.numbers(6, D) if transposed else s.numbers(D, 6)
    before = s.op("Add", x, s.weight(s.numbers(D)))
    y = s.op("Gemm", before, s.weight(weight), s.weight(s.numbers(6)), transB=transposed, alpha=alpha, beta=beta)
    s.op("Add", y, s.weight(s.numbers(6)), out=s.output("y"))
    model, result = fold(s, tmp_path, ROWS)
    assert result.fired == 2
    assert ops(model) == ["Gemm"]


def test_a_gemm_without_a_bias_gets_one(tmp_path):
    s, x = sketch(("rows", D))
    s.op("Add", s.op("Gemm", x, s.weight(s.numbers(D, 6))), s.weight(s.numbers(6)), out=s.output("y"))
    assert ops(fold(s, tmp_path, ROWS)[0]) == ["Gemm"]


def test_a_product_of_rank_two_becomes_a_gemm(tmp_path):
    s, x = sketch(("rows", D))
    s.op("Identity", s.linear(x, D, 6), out=s.output("y"))
    assert ops(fold(s, tmp_path, ROWS)[0]) == ["Gemm", "Identity"]


@pytest.mark.parametrize("shape", [("batch", "tokens", D), None], ids=["rank 3", "no shape"])
def test_a_product_of_another_rank_stays(tmp_path, shape):
    s = Sketch()
    x = s.input("x", shape)
    s.op("Identity", s.linear(x, D, 6), out=s.output("y"))
    stays(s, tmp_path)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_takes_what_stands_behind_it(tmp_path, bias):
    s, x = sketch(("batch", 3, "h", "w"))
    inputs = [x, s.weight(s.numbers(4, 3, 3, 3))] + ([s.weight(s.numbers(4))] if bias else [])
    s.op("Add", s.op("Conv", *inputs, kernel_shape=[3, 3]), s.weight(s.numbers(4, 1, 1)), out=s.output("y"))
    assert ops(fold(s, tmp_path, IMAGE)[0]) == ["Conv"]


def test_a_convolution_does_not_take_a_number_for_each_pixel(tmp_path):
    s, x = sketch(("batch", 3, "h", "w"))
    s.op("Add", s.op("Conv", x, s.weight(s.numbers(4, 3, 3, 3)), kernel_shape=[3, 3]), s.weight(s.numbers(4, 4)),
         out=s.output("y"))
    stays(s, tmp_path, feed=IMAGE)


def test_zeros_are_not_added(tmp_path):
    s, x = sketch()
    s.op("Relu", s.op("Add", s.weight(np.zeros(D, np.float32)), x), out=s.output("y"))
    assert ops(fold(s, tmp_path)[0]) == ["Relu"]


def test_zeros_that_make_an_output(tmp_path):
    s, x = sketch()
    s.op("Add", s.info(s.op("Relu", x), ["batch", "tokens", D]), s.weight(np.zeros(D, np.float32)), out=s.output("y"))
    assert ops(fold(s, tmp_path)[0]) == ["Relu"]


def test_zeros_on_a_value_of_unknown_shape_stay(tmp_path):
    s, x = sketch()
    s.op("Add", s.op("Relu", x), s.weight(np.zeros(D, np.float32)), out=s.output("y"))
    stays(s, tmp_path)


def test_zeros_that_broadcast_stay(tmp_path):
    s, x = sketch(("batch", 1, D))
    s.op("Relu", s.op("Add", x, s.weight(np.zeros((7, D), np.float32))), out=s.output("y"))
    stays(s, tmp_path, feed={"x": X["x"][:, :1]})


def test_zero_biases_go(tmp_path):
    s, x = sketch(("rows", D))
    normed = s.op("LayerNormalization", x, s.weight(s.numbers(D)), s.weight(np.zeros(D, np.float32)))
    s.op("Gemm", s.op("Relu", normed), s.weight(s.numbers(D, 6)), s.weight(np.zeros(6, np.float32)), out=s.output("y"))
    model, result = fold(s, tmp_path, ROWS)
    assert result.fired == 2
    assert [len(node.inputs) for node in model.graph.nodes] == [2, 1, 2]


def test_a_gemm_keeps_its_zeros_where_the_opset_wants_them(tmp_path):
    s, x = sketch(("rows", D), opset=9)
    s.op("Gemm", x, s.weight(s.numbers(D, 6)), s.weight(np.zeros(6, np.float32)), out=s.output("y"))
    stays(s, tmp_path, feed=ROWS)


def test_the_shift_of_a_norm_moves_into_the_linears(tmp_path):
    s, x = sketch()
    normed = s.norm(x, D)
    s.op("Mul", s.linear(normed, D, 6), s.linear(normed, D, 6), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    assert len(next(node for node in model.graph.nodes if node.op == "LayerNormalization").inputs) == 2


def test_the_shift_of_a_norm_stays_where_something_else_reads_it(tmp_path):
    s, x = sketch()
    normed = s.norm(x, D)
    s.op("Add", s.linear(normed, D, D), normed, out=s.output("y"))
    stays(s, tmp_path, "another consumer")


def test_the_shift_of_a_norm_stays_where_a_linear_has_no_bias(tmp_path):
    s, x = sketch()
    s.op("Relu", s.linear(s.norm(x, D), D, 6, bias=False), out=s.output("y"))
    stays(s, tmp_path, "no bias")


def test_the_last_addition_of_a_norm_written_out_stays(tmp_path):
    """ONNX Runtime recognizes the norm by it, and fuses the whole."""
    s, x = sketch()
    centred = s.op("Sub", x, s.op("ReduceMean", x, axes=[-1]))
    variance = s.op("ReduceMean", s.op("Pow", centred, s.number(2)), axes=[-1])
    bare = s.op("Div", centred, s.op("Sqrt", s.op("Add", variance, s.number(1e-5))))
    normed = s.op("Add", s.op("Mul", bare, s.weight(1 + s.numbers(D))), s.weight(s.numbers(D)))
    s.op("Identity", s.linear(normed, D, 6), out=s.output("y"))
    fold(s, tmp_path)
    assert "LayerNormalization" in optimized_ops(tmp_path / "after.onnx", tmp_path)


def test_a_value_between_that_is_an_output_stays(tmp_path):
    s, x = sketch()
    first = s.op("Add", x, s.weight(s.numbers(D)), out=s.output("between"))
    s.op("Add", first, s.weight(s.numbers(D)), out=s.output("y"))
    stays(s, tmp_path)


def test_a_sum_that_is_an_output_stays_ahead_of_its_linear(tmp_path):
    s, x = sketch()
    s.op("Identity", s.linear(s.op("Add", x, s.weight(s.numbers(D)), out=s.output("sum")), D, 6), out=s.output("y"))
    stays(s, tmp_path)


def test_a_value_between_that_something_else_reads_stays(tmp_path):
    s, x = sketch()
    first = s.op("Add", x, s.weight(s.numbers(D)))
    s.op("Mul", s.op("Add", first, s.weight(s.numbers(D))), s.op("Relu", first), out=s.output("y"))
    stays(s, tmp_path)


def test_a_sum_that_a_linear_and_something_else_read_stays(tmp_path):
    s, x = sketch()
    shifted = s.op("Add", x, s.weight(s.numbers(D)))
    s.op("Add", s.linear(shifted, D, D), s.op("Relu", shifted), out=s.output("y"))
    stays(s, tmp_path)


@pytest.mark.parametrize("ahead", ["Add", "norm"])
def test_a_product_without_its_bias_that_is_an_output_stays(tmp_path, ahead):
    """It would miss what is moved behind it."""
    s, x = sketch()
    value = s.op("Add", x, s.weight(s.numbers(D))) if ahead == "Add" else s.norm(x, D)
    product = s.op("MatMul", value, s.weight(s.numbers(D, 6)), out=s.output("product"))
    s.op("Add", product, s.weight(s.numbers(6)), out=s.output("y"))
    stays(s, tmp_path, None if ahead == "Add" else "another consumer")


def test_a_linear_without_a_bias_gets_none(tmp_path):
    s, x = sketch()
    s.op("Relu", s.linear(s.op("Add", x, s.weight(s.numbers(D))), D, 6, bias=False), out=s.output("y"))
    stays(s, tmp_path)


def test_a_product_that_something_else_reads_keeps_its_bias_apart(tmp_path):
    s, x = sketch(("rows", D))
    product = s.op("Gemm", x, s.weight(s.numbers(D, 6)), s.weight(s.numbers(6)))
    s.op("Mul", s.op("Add", product, s.weight(s.numbers(6))), s.op("Relu", product), out=s.output("y"))
    stays(s, tmp_path, feed=ROWS)


@pytest.mark.parametrize("where", ["sum", "ahead"])
def test_what_the_caller_may_override_stays(tmp_path, where):
    s, x = sketch()
    free = s.weight(s.numbers(D), "free")
    s.input("free", [D])
    first = s.op("Add", x, free)
    if where == "sum":
        s.op("Add", first, s.weight(s.numbers(D)), out=s.output("y"))
    else:
        s.op("Identity", s.linear(first, D, 6), out=s.output("y"))
    stays(s, tmp_path, "override")


def test_zeros_that_the_caller_may_override_stay(tmp_path):
    s, x = sketch()
    s.weight(np.zeros(D, np.float32), "free")
    s.input("free", [D])
    s.op("Relu", s.op("Add", x, "free"), out=s.output("y"))
    stays(s, tmp_path, feed={**X, "free": np.ones(D, np.float32)})


def test_a_mask_is_not_added_in_another_order(tmp_path):
    s, x = sketch()
    mask = s.op("Add", x, s.weight(np.where(np.arange(D) < 4, 0, -1e9).astype(np.float32)))
    s.op("Softmax", s.op("Add", mask, s.weight(s.numbers(D))), out=s.output("y"))
    stays(s, tmp_path, "another order of adding")


def test_shared_constants_are_not_multiplied(tmp_path):
    """Both sums would be new constants, and the three that are there would stay."""
    s, x = sketch()
    a, b, c = (s.weight(s.numbers(D)) for _ in range(3))
    first = s.op("Add", s.op("Add", x, a), b)
    second = s.op("Add", s.op("Add", s.op("Relu", x), a), c)
    s.op("Sum", first, second, s.op("Mul", x, b), s.op("Mul", x, c), out=s.output("y"))
    stays(s, tmp_path, "shared")


def test_linears_that_share_a_bias_get_each_its_own(tmp_path):
    s, x = sketch()
    bias = s.weight(s.numbers(6))
    shifted = s.op("Add", x, s.weight(s.numbers(D)))
    parts = [s.op("Add", s.op("MatMul", value, s.weight(s.numbers(D, 6))), bias) for value in (shifted, s.op("Relu", x))]
    s.op("Mul", *parts, out=s.output("y"))
    model, _ = rewrite(s, tmp_path, "fold-bias")
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_integers_stay(tmp_path):
    s = Sketch()
    x = s.input("x", [4], TensorProto.INT64)
    first = s.op("Add", x, s.weight(np.arange(4)))
    s.op("Add", first, s.weight(np.arange(4)), out=s.output("y", [4], TensorProto.INT64))
    stays(s, tmp_path, feed={"x": np.arange(4)})


def test_half_precision(tmp_path):
    s, x = sketch(dtype=np.float16)
    shifted = s.op("Add", s.op("Add", x, s.weight(s.numbers(D))), s.weight(s.numbers(D)))
    s.op("Identity", s.linear(shifted, D, 6), out=s.output("y"))
    model, result = fold(s, tmp_path, {"x": X["x"].astype(np.float16)}, tolerance=3e-3)
    assert result.fired == 2
    assert ops(model) == ["MatMul", "Add", "Identity"]


def test_a_quantized_matrix_stays_a_matmul(tmp_path):
    s, x = sketch(("rows", D), opset=21)
    weight = s.op("DequantizeLinear", s.weight(np.ones((D, 6), np.int8)), s.number(0.1))
    s.op("Add", s.op("MatMul", x, weight), s.weight(s.numbers(6)), out=s.output("y"))
    stays(s, tmp_path, "quantized", feed=ROWS)


def test_inside_an_if(tmp_path):
    inner = Branch()
    shifted = inner.op("Add", inner.op("Add", "x", inner.weight(inner.numbers(D))), inner.weight(inner.numbers(D)))
    s = in_branch(inner, inner.op("Relu", shifted), ["batch", "tokens", D])
    feed = {**X, "wanted": np.asarray(True)}
    model, result = fold(s, tmp_path, feed)
    assert result.fired == 1
    assert [node.op for _, graph in model.graphs() for node in graph.nodes].count("Add") == 1


def test_what_an_inner_graph_reads_stays(tmp_path):
    """The branch reads the first sum, which has one reader outside."""
    inner = Branch()
    s = in_branch(inner, inner.op("Relu", "between"), ["batch", "tokens", D])
    first = s.op("Add", "x", s.weight(s.numbers(D)), out="between")
    s.op("Add", first, s.weight(s.numbers(D)), out=s.output("z"))
    s.nodes.sort(key=lambda node: node.op_type == "If")
    stays(s, tmp_path, feed={**X, "wanted": np.asarray(True)})


def test_numbers_of_no_axes_become_one(tmp_path):
    s, x = sketch()
    s.op("Add", s.op("Add", x, s.number(0.5)), s.number(0.25), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    assert ops(model) == ["Add"]


@pytest.mark.parametrize(("shape", "given"), [((1, 1, D), (5, D)), ((D,), (5, 1))], ids=["axes", "width"])
def test_an_addition_that_gives_its_value_another_shape_stays(tmp_path, shape, given):
    s, x = sketch(["rows", "width"])
    s.op("Add", s.op("MatMul", s.op("Add", x, s.weight(s.numbers(*shape))), s.weight(s.numbers(D, 4))), s.weight(s.numbers(4)),
         out=s.output("y"))
    [feed] = feeds_of(given)
    stays(s, tmp_path, "another shape", feed)


def test_an_addition_that_repeats_its_value_stays(tmp_path):
    s, x = sketch()
    wide = s.op("Add", s.op("MatMul", x, s.weight(s.numbers(D, 1))), s.weight(s.numbers(6)))
    s.op("Add", s.op("MatMul", wide, s.weight(s.numbers(6, 4))), s.weight(s.numbers(4)), out=s.output("y"))
    stays(s, tmp_path, "another shape")


def test_zeros_that_repeat_a_value_of_stale_shape_stay(tmp_path):
    s, x = sketch(["batch", D])
    s.op("Add", s.info(s.op("Relu", x), [4, D]), s.weight(np.zeros((4, D), np.float32)), out=s.output("y"))
    [feed] = feeds_of((1, D))
    stays(s, tmp_path, None, feed)


def test_float16_numbers_that_round_to_integers_stay(tmp_path):
    s, x = sketch(dtype=np.float16)
    s.op("Add", s.op("Add", x, s.number(1536)), s.number(-1536), out=s.output("y"))
    stays(s, tmp_path, "so large", {"x": X["x"].astype(np.float16)})


def test_one_shift_for_all_features_of_a_norm(tmp_path):
    s, x = sketch()
    normed = s.op("LayerNormalization", x, s.weight(s.numbers(1)), s.weight(s.numbers(1)))
    s.op("Add", s.op("MatMul", normed, s.weight(s.numbers(D, 4))), s.weight(s.numbers(4)), out=s.output("y"))
    _, result = fold(s, tmp_path)
    assert result.fired == 1
