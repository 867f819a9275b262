"""fold-norm: which norms give their scale and shift away, and which must keep them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, optimized_ops, run
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.optimize import Job, optimize_file
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from onnx import TensorProto

D = 8
X = {"x": np.random.default_rng(3).normal(size=(2, 5, D)).astype(np.float32)}


def fold(source: Sketch, folder: Path) -> tuple[Model, PassResult]:
    """The model after fold-norm, read back from the file it was written to."""
    onnx.save_model(source.model(), folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse(["fold-norm"]), threads=1)
    model.save(folder / "folded.onnx")
    return Model.load(folder / "folded.onnx"), result


def sketch(opset: int = 17, dtype: type = np.float32) -> tuple[Sketch, str]:
    s = Sketch(opset, dtype=dtype)
    return s, s.input("x", ["batch", "tokens", D])


def rms_norm(s: Sketch, x: str, *, reciprocal: bool) -> str:
    """x / √(mean x² + ε) ∘ γ as the TorchScript (Div) or the dynamo exporter (Reciprocal) writes it."""
    mean = s.op("ReduceMean", s.op("Pow", x, s.number(2)), axes=[-1])
    root = s.op("Sqrt", s.op("Add", mean, s.number(1e-5)))
    if reciprocal:
        normed = s.op("Mul", x, s.op("Reciprocal", root))
    else:
        normed = s.op("Mul", x, s.op("Div", s.number(1), root))
    return s.op("Mul", s.weight(1 + s.numbers(D, scale=0.3), "gamma"), normed)


def weight_of(model: Model, name: str) -> np.ndarray:
    [constant] = [each for each in model.graph.constants if each.name == name]
    return constant._values.load()


def check(s: Sketch, model: Model, tolerance: float = 1e-6) -> None:
    assert drift(run(s.model(), X), run(model, X)) < tolerance


def test_layer_norm_gives_scale_and_shift_to_every_linear_behind_it(tmp_path):
    s, x = sketch()
    normed = s.norm(x, D)
    s.op("Add", s.linear(normed, D, 6), s.linear(normed, D, 6), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    [norm] = [node for node in model.graph.nodes if node.op == "LayerNormalization"]
    assert len(norm.inputs) == 2
    assert weight_of(model, norm.inputs[1].name).tolist() == [1] * D
    check(s, model)


def test_gemm_with_transposed_weight(tmp_path):
    s, x = sketch()
    rows = s.op("Reshape", s.norm(x, D), s.weight(np.asarray([-1, D])))
    s.op("Gemm", rows, s.weight(s.numbers(6, D)), s.weight(s.numbers(6)), out=s.output("y"), transB=1)
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    check(s, model)


def test_weight_behind_a_transpose(tmp_path):
    s, x = sketch()
    weight = s.op("Transpose", s.weight(s.numbers(6, D)), perm=[1, 0])
    product = s.op("MatMul", s.norm(x, D), weight)
    s.op("Add", product, s.weight(s.numbers(6)), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    assert "Transpose" not in ops(model)
    check(s, model)


def test_rms_norm_that_onnx_runtime_leaves_in_pieces_loses_a_node(tmp_path):
    s, x = sketch()
    s.op("MatMul", rms_norm(s, x, reciprocal=True), s.weight(s.numbers(D, 6)), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    assert ops(model).count("Mul") == 1
    assert len(optimized_ops(tmp_path / "folded.onnx", tmp_path)) < len(optimized_ops(tmp_path / "model.onnx", tmp_path))
    check(s, model)


def test_norm_that_onnx_runtime_fuses_stays_fused(tmp_path):
    s, x = sketch()
    centred = s.op("Sub", x, s.op("ReduceMean", x, axes=[-1]))
    variance = s.op("ReduceMean", s.op("Pow", centred, s.number(2)), axes=[-1])
    bare = s.op("Div", centred, s.op("Sqrt", s.op("Add", variance, s.number(1e-5))))
    scaled = s.op("Mul", bare, s.weight(1 + s.numbers(D, scale=0.3)))
    normed = s.op("Add", scaled, s.weight(s.numbers(D)))
    s.op("Add", s.op("MatMul", normed, s.weight(s.numbers(D, 6))), s.weight(s.numbers(6)), out=s.output("y"))
    assert "LayerNormalization" in optimized_ops(s.save(tmp_path / "before.onnx"), tmp_path)
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    assert "LayerNormalization" in optimized_ops(tmp_path / "folded.onnx", tmp_path)
    check(s, model)


def test_norms_of_one_width_share_their_ones(tmp_path):
    s, x = sketch()
    hidden = s.linear(s.norm(x, D), D, D)
    s.op("Identity", s.linear(s.norm(hidden, D), D, 6), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 2
    scales = {node.inputs[1].name for node in model.graph.nodes if node.op == "LayerNormalization"}
    assert len(scales) == 1
    assert (tmp_path / "folded.onnx").stat().st_size < (tmp_path / "model.onnx").stat().st_size
    check(s, model)


def test_a_norm_folded_once_is_left_alone(tmp_path):
    s, x = sketch()
    s.op("Identity", s.linear(s.norm(x, D), D, 6), out=s.output("y"))
    model, _ = fold(s, tmp_path)
    [again] = run_plan(model, Plan.parse(["fold-norm"]), threads=1)
    assert again.fired == 0


def refused(s: Sketch, folder: Path, words: str) -> None:
    model, result = fold(s, folder)
    assert result.fired == 0
    assert words in result.refused[0].reason
    assert ops(model) == ops(s.model())


def test_another_consumer_keeps_the_norm(tmp_path):
    s, x = sketch()
    normed = s.norm(x, D)
    s.op("Add", s.linear(normed, D, D), normed, out=s.output("y"))
    refused(s, tmp_path, "another consumer")


def test_a_product_without_its_bias_that_is_an_output_keeps_the_norm(tmp_path):
    """It would miss the shift."""
    s, x = sketch()
    product = s.op("MatMul", s.norm(x, D), s.weight(s.numbers(D, 6)), out=s.output("product"))
    s.op("Add", product, s.weight(s.numbers(6)), out=s.output("y"))
    refused(s, tmp_path, "another consumer")


def test_a_norm_that_is_an_output_stays(tmp_path):
    s, x = sketch()
    normed = s.norm(x, D)
    s.output(normed)
    s.op("Identity", s.linear(normed, D, 6), out=s.output("y"))
    refused(s, tmp_path, "output of the graph")


def test_a_shared_weight_stays_shared(tmp_path):
    s, x = sketch()
    weight = s.weight(s.numbers(D, D))
    bias = s.weight(s.numbers(D))
    hidden = s.op("Add", s.op("MatMul", x, weight), bias)
    s.op("Add", s.op("MatMul", s.norm(hidden, D), weight), bias, out=s.output("y"))
    refused(s, tmp_path, "shared")


def test_two_linears_with_one_weight_stay(tmp_path):
    s, x = sketch()
    weight = s.weight(s.numbers(D, 6))
    normed = s.norm(x, D)
    parts = [s.op("Add", s.op("MatMul", normed, weight), s.weight(s.numbers(6))) for _ in range(2)]
    s.op("Mul", *parts, out=s.output("y"))
    refused(s, tmp_path, "shared")


def test_shift_needs_a_bias_to_go_to(tmp_path):
    s, x = sketch()
    s.op("Identity", s.linear(s.norm(x, D), D, 6, bias=False), out=s.output("y"))
    refused(s, tmp_path, "no bias")


def test_the_file_must_not_grow(tmp_path):
    """A Gemm without a bias, wider than the norm: the new bias is longer than the shift it replaces."""
    s, x = sketch()
    rows = s.op("Reshape", s.norm(x, D), s.weight(np.asarray([-1, D])))
    s.op("Gemm", rows, s.weight(s.numbers(D, 64)), out=s.output("y"))
    refused(s, tmp_path, "would grow")


@pytest.mark.parametrize("which", ["weight", "scale"])
def test_what_the_caller_may_override_stays(tmp_path, which):
    s, x = sketch()
    scale = s.weight(1 + s.numbers(D), "scale")
    weight = s.weight(s.numbers(D, 6), "weight")
    s.input(which, [D] if which == "scale" else [D, 6])
    s.op("MatMul", s.op("LayerNormalization", x, scale), weight, out=s.output("y"))
    refused(s, tmp_path, "override")


def test_half_precision_stays(tmp_path):
    s, x = sketch(dtype=np.float16)
    s.op("Identity", s.linear(s.norm(x, D), D, 6), out=s.output("y"))
    refused(s, tmp_path, "16 bits")


def test_quantized_weights_stay(tmp_path):
    s, x = sketch(21)
    weight = s.op("DequantizeLinear", s.weight(np.ones((D, 6), np.int8)), s.number(0.1), s.weight(np.asarray(0, np.int8)))
    s.op("MatMul", s.op("LayerNormalization", x, s.weight(1 + s.numbers(D))), weight, out=s.output("y"))
    refused(s, tmp_path, "quantized")


def test_experts_read_through_a_gather_stay(tmp_path):
    s, x = sketch()
    packed = s.weight(s.numbers(3, D, 6))
    chosen = s.op("Gather", packed, s.input("expert", [], TensorProto.INT64))
    s.op("MatMul", s.op("LayerNormalization", x, s.weight(1 + s.numbers(D))), chosen, out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 0
    assert result.refused
    assert ops(model) == ops(s.model())


def test_a_scale_that_weights_would_vanish_under_is_refused(tmp_path):
    s, x = sketch()
    normed = s.op("LayerNormalization", x, s.weight(np.full(D, 1e-25, np.float32)))
    s.op("Mul", s.op("MatMul", normed, s.weight(s.numbers(D, 6, scale=1e-20))), s.number(1e38), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert (result.fired, [each.reason for each in result.refused]) == (
        0, ["the scale is so small that the weights may vanish"])
    check(s, model)


def test_a_weight_that_would_overflow_is_never_written(tmp_path):
    s, x = sketch()
    normed = s.op("LayerNormalization", x, s.weight(np.full(D, 100, np.float32)))
    s.op("MatMul", normed, s.weight(s.numbers(D, 64, scale=1e38)), out=s.output("y"))
    onnx.save_model(s.model(), tmp_path / "model.onnx")
    job = Job(tmp_path / "model.onnx", tmp_path / "folded.onnx", Plan.parse(["fold-norm"]), verify=False)
    with pytest.raises(InputError, match=r"model.onnx: .* too large for float32"):
        optimize_file(job)
    assert not (tmp_path / "folded.onnx").exists()


def test_a_scale_that_adds_an_axis_stays(tmp_path):
    s = Sketch()
    x = s.input("x", ["rows", D])
    mean = s.op("ReduceMean", s.op("Pow", x, s.number(2)), axes=[-1])
    normed = s.op("Div", x, s.op("Sqrt", s.op("Add", mean, s.number(1e-5))))
    s.op("MatMul", s.op("Mul", normed, s.weight(s.numbers(1, 1, D))), s.weight(s.numbers(D, 6)), out=s.output("y"))
    model, result = fold(s, tmp_path)
    assert result.fired == 0
    assert run(model, {"x": X["x"][0]})["y"].shape == (1, 5, 6)
