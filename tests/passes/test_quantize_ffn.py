"""quantize-ffn: what ONNX Runtime runs of it, what keeps it accurate, and what it leaves alone."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, optimized_ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.graph.nbits import dequantize_nbits, pack_nbits
from ffnfold.passes import quantize_ffn
from ffnfold.passes.base import PassResult
from ffnfold.passes.int8 import form_choice
from ffnfold.passes.int8.row_choice import row_noise
from ffnfold.passes.int8.weight_codes import Rounding
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from ffnfold.runtime.processor import products_saturate
from ffnfold.runtime.specs import input_specs
from onnx import TensorProto, helper

D, FF = 64, 256
RANDOM = np.random.default_rng(7)
X = {"x": RANDOM.normal(size=(2, 16, D)).astype(np.float32)}


def quantize(s: Sketch, folder: Path, options: str = "", fit: Feeds | None = None) -> tuple[Model, PassResult]:
    """The quantized model, as it is read from the file it was saved to."""
    onnx.save_model(s.model(), folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse(["quantize-ffn" + (options and f":{options}")]), fit=fit, threads=1)
    model.save(folder / "quantized.onnx")
    return Model.load(folder / "quantized.onnx"), result


def executed(folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime runs of the quantized model, after its fusions."""
    return Counter(optimized_ops(folder / "quantized.onnx", folder))


def lost(s: Sketch, folder: Path, options: str = "", fit: Feeds | None = None, feed=X) -> float:
    """Drift of the outputs on ``feed``."""
    model, result = quantize(s, folder, options, fit)
    assert result.fired
    return drift(run(s.model(), feed), run(model, feed))


def post_norm(blocks: int = 1, scale: np.ndarray | None = None, **kind) -> Sketch:
    """Blocks on a stream that a LayerNorm gives: ``y = norm(x + ffn(x))``, as in BERT."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    scale = np.ones(D, np.float32) if scale is None else scale
    for number in range(blocks + 1):
        x = s.op("LayerNormalization", x, s.weight(scale), s.weight(s.numbers(D, scale=0.1)), axis=-1)
        if number < blocks:
            x = s.op("Add", x, s.ffn(x, D, FF, name=f"/layer.{number}/ffn", **kind))
    s.op("Identity", x, out=s.output("y", ["batch", "tokens", D]))
    return s


# what ONNX Runtime runs

@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_integer_products_are_fused(tmp_path, opset, activation):
    s = transformer(2, D, FF, opset=opset, activation=activation, pre_norm=opset >= 17)
    assert lost(s, tmp_path) < 0.02
    ran = executed(tmp_path)
    assert ran["MatMulIntegerToFloat"] == 4
    assert not ran["MatMul"] + ran["MatMulInteger"] + ran["DynamicQuantizeLinear"]


def test_without_rows_everything_is_one_operator(tmp_path):
    lost(transformer(2, D, FF, activation="gelu"), tmp_path, "row_scale=false")
    ran = executed(tmp_path)
    assert ran["DynamicQuantizeMatMul"] == 4
    assert ran["Add"] == 2, "the biases are absorbed, the two residual sums stay"
    assert not ran["ReduceMax"] + ran["Div"]


def test_gate_and_up_share_one_quantization(tmp_path):
    lost(transformer(1, D, FF, activation="silu", gated=True), tmp_path, "row_scale=false")
    ran = executed(tmp_path)
    assert (ran["DynamicQuantizeLinear"], ran["MatMulIntegerToFloat"], ran["DynamicQuantizeMatMul"]) == (1, 2, 1)
    lost(transformer(1, D, FF, activation="silu", gated=True), tmp_path, "row_scale=true")
    ran = executed(tmp_path)
    assert (ran["ReduceMax"], ran["QuantizeLinear"], ran["MatMulIntegerToFloat"]) == (2, 2, 3)


@pytest.mark.parametrize(("activation", "gated", "magnitudes"), [
    ("gelu", False, 0), ("silu", False, 0), ("relu", False, 0), ("mish", False, 0), ("tanh", False, 1), ("elu", False, 1),
    ("silu", True, 1)])
def test_no_absolute_values_behind_an_activation_that_stays_above_zero(tmp_path, activation, gated, magnitudes):
    model, _ = quantize(post_norm(activation=activation, gated=gated, scale=np.linspace(1, 9, D, dtype=np.float32)), tmp_path)
    assert ops(model).count("Abs") == magnitudes
    assert ops(model).count("ReduceMax") == 1, "the projections from the smoothed stream need no rows"


def test_bits_of_storage(tmp_path):
    for options, operator, dequantize in (("form=nbits", "MatMulNBits", 0), ("bits=4", "MatMulNBits", 0),
                                          ("form=weight-only", "MatMul", 2)):
        model, _ = quantize(transformer(1, D, FF, activation="gelu"), tmp_path, options)
        assert ops(model).count(operator) == 2
        assert ops(model).count("DequantizeLinear") == dequantize
        assert executed(tmp_path)["MatMulNBits"] == 2, options


@pytest.mark.parametrize("options", ["form=nbits", "form=nbits,gptq=true", "bits=4,block_size=1048576", "form=weight-only"])
def test_a_block_is_no_longer_than_the_weight(tmp_path, options):
    """Weights are stored in whole blocks: of 48 inputs 64 are stored, of 5 16."""
    for d_model, d_ff, stored in ((48, 100, (64, 128)), (5, 16, (16, 16))):
        s = transformer(1, d_model, d_ff, opset=21, activation="gelu")
        feed = {"x": RANDOM.normal(size=(2, 16, d_model)).astype(np.float32)}
        large = options if "block_size" in options else f"{options},block_size=4096"
        assert lost(s, tmp_path, large, Feeds.of([feed]), feed) < (0.3 if "bits" in options else 0.02)
        sizes = sorted(int(np.prod(each.dims)) for each in onnx.load(tmp_path / "quantized.onnx").graph.initializer
                       if each.data_type in (TensorProto.INT8, TensorProto.UINT8))
        share = 2 if "bits=4" in options else 1
        padded = (d_model, d_ff) if "weight-only" in options else stored
        assert sizes == sorted((padded[0] * d_ff // share, padded[1] * d_model // share)), options


def test_the_form_follows_the_target():
    assert Plan.parse(["quantize-ffn"]).passes[0]._form == "dynamic"
    assert Plan.parse(["quantize-ffn:target=cuda"]).passes[0]._form == "nbits"
    assert Plan.parse(["quantize-ffn:target=cuda,form=weight-only"]).passes[0]._form == "weight-only"
    assert Plan.parse(["quantize-ffn:bits=4"]).passes[0]._form == "nbits"


def test_a_rewritten_block_is_still_a_block(tmp_path):
    for opset, gated, options in itertools.product((17, 21), (False, True), ("", "row_scale=true", "form=nbits", "smooth=feeds")):
        s = transformer(2, D, FF, opset=opset, activation="silu", gated=gated)
        model, _ = quantize(s, tmp_path, options, Feeds.of([X]))
        blocks = find_ffn_blocks(model)
        assert [(b.activation.name, b.gated, b.d_ff, b.quantized) for b in blocks] == [("silu", gated, FF, True)] * 2
        [again] = run_plan(model, Plan.parse(["quantize-ffn"]), threads=1)
        assert again.fired == 0
        assert {refused.reason for refused in again.refused} == {"its weights are stored as integers already"}


# what keeps it accurate

def test_an_outlier_token_ruins_a_tensor_and_not_a_row(tmp_path):
    s = transformer(1, D, FF, activation="relu", pre_norm=False)
    feed = {"x": X["x"].copy()}
    feed["x"][0, 0] *= 300
    model, _ = quantize(s, tmp_path, "row_scale=true")
    others = {name: value[:, 1:] for name, value in run(s.model(), feed).items()}
    by_row = drift(others, {name: value[:, 1:] for name, value in run(model, feed).items()})
    model, _ = quantize(s, tmp_path, "row_scale=false")
    by_tensor = drift(others, {name: value[:, 1:] for name, value in run(model, feed).items()})
    assert by_row < 0.02
    assert by_tensor > 10 * by_row


def test_feeds_tell_which_activations_need_rows(tmp_path):
    s = transformer(2, D, FF, activation="gelu")
    loud = X["x"].copy()
    loud[0, 0] *= 1e3
    s_loud = Sketch()  # no norm: an outlier token reaches the products as it is
    x = s_loud.input("x", ["batch", "tokens", D])
    s_loud.op("Add", x, s_loud.ffn(x, D, FF, activation="gelu"), out=s_loud.output("y", ["batch", "tokens", D]))
    for sketch, feed, rows in ((s, X["x"], 0), (s_loud, loud, 2)):
        model, _ = quantize(sketch, tmp_path, "smooth=feeds", Feeds.of([{"x": feed}]))
        assert ops(model).count("ReduceMax") == rows
        assert ops(model).count("DynamicQuantizeLinear") == (4 if rows == 0 else 0)
    model, _ = quantize(s, tmp_path, "smooth=feeds,row_scale=true", Feeds.of([X]))
    assert ops(model).count("ReduceMax") == 4, "what the caller says is done, whatever was measured"


def test_the_noise_of_one_scale_is_what_rounding_to_it_costs_each_row():
    x = np.abs(RANDOM.normal(size=(40, 3000))) * np.geomspace(1, 30, 40)[:, None]
    for rows in (x, x * np.sign(RANDOM.normal(size=x.shape))):
        step = (rows.max() - min(rows.min(), 0)) / 255
        measured = np.sqrt(((np.rint(rows / step) * step - rows) ** 2).mean(axis=1) / (rows ** 2).mean(axis=1))
        np.testing.assert_allclose(row_noise(rows), measured, rtol=0.2)
    assert row_noise(np.zeros((3, 8))).tolist() == [0, 0, 0], "a row of zeros loses nothing"
    assert row_noise(np.array([[1e9, 1], [1e-9, 1e-9]]))[1] == 1, "no row loses more than all of it"


def test_rows_of_zeros(tmp_path):
    for activation in ("relu", "tanh", "gelu"):
        s = transformer(1, D, FF, activation=activation, bias=False, pre_norm=False)
        model, _ = quantize(s, tmp_path, "row_scale=true")
        assert not np.any(run(model, {"x": np.zeros((1, 3, D), np.float32)})["y"])


def test_outlier_channels_of_a_post_norm_stream_need_no_feeds(tmp_path):
    scale = np.ones(D, np.float32)
    scale[[3, 40]] = 60
    s = post_norm(scale=scale, activation="gelu")
    for weight in s.initializers.values():
        if list(weight.dims) == [D, FF]:
            array = onnx.numpy_helper.to_array(weight) / scale[:, None]  # as a trained model balances them
            weight.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), weight.name))
    assert lost(s, tmp_path, "smooth=norm,row_scale=false") < 0.5 * lost(s, tmp_path, "smooth=none,row_scale=false")
    assert "smooth_output" in " ".join(name for node in quantize(s, tmp_path)[0].graph.nodes for name in (
        each.name for each in node.outputs))


def test_the_scale_of_a_pre_norm_says_nothing_of_its_outliers(tmp_path):
    model, _ = quantize(transformer(1, D, FF, activation="gelu"), tmp_path, "smooth=norm")
    assert not [node for node in model.graph.nodes if "smooth" in node.name]


@pytest.mark.parametrize("options", ["", "form=nbits", "bits=4", "form=weight-only", "row_scale=false"])
def test_a_stream_with_massive_features_survives_fold_norm(tmp_path, options):
    """γ is small where the stream is large. Folded, the weight has rows of nearly zero and the norm gives outliers."""
    s = Sketch()
    stream = np.ones(D, np.float32)
    stream[[3, 40]] = 300
    x = s.op("Mul", s.input("x", ["batch", "tokens", D]), s.weight(stream))
    y = s.op("LayerNormalization", x, s.weight((1 / stream).astype(np.float32)), axis=-1)
    s.op("Add", x, s.ffn(y, D, FF, activation="silu", gated=True), out=s.output("y", ["batch", "tokens", D]))

    def branch(plan: list[str]) -> float:
        onnx.save_model(s.model(), tmp_path / "model.onnx")
        model = Model.load(tmp_path / "model.onnx")
        assert all(result.fired == 1 for result in run_plan(model, Plan.parse(plan), threads=1))
        before, after = run(s.model(), X)["y"] - X["x"] * stream, run(model, X)["y"] - X["x"] * stream
        return drift({"y": before}, {"y": after})

    quantized = f"quantize-ffn:{options}" if options else "quantize-ffn"
    plain, folded = branch([quantized]), branch(["fold-norm", quantized])
    without = branch(["fold-norm", quantized + (",smooth=none" if options else ":smooth=none")])
    assert folded < 1.5 * plain
    assert without > (1.2 if "bits=4" in options else 2) * folded


def test_channels_measured_on_feeds_go_into_the_norm(tmp_path):
    s = transformer(1, D, FF, activation="gelu")
    gamma = next(name for node in s.nodes if node.op_type == "LayerNormalization" for name in node.input[1:2])
    array = onnx.numpy_helper.to_array(s.initializers[gamma]).copy()
    array[5] *= 50
    s.initializers[gamma].CopyFrom(onnx.numpy_helper.from_array(array, gamma))
    plain = lost(s, tmp_path, "smooth=none,row_scale=false")
    assert lost(s, tmp_path, "smooth=feeds,row_scale=false", Feeds.of([X])) < 0.6 * plain
    model, _ = quantize(s, tmp_path, "smooth=feeds,row_scale=false", Feeds.of([X]))
    assert executed(tmp_path)["Mul"] == 0, "the norm took it"
    norm = next(node for node in model.graph.nodes if node.op == "LayerNormalization")
    assert norm.inputs[1]._values.load()[5] < 0.3 * array[5]


@pytest.mark.parametrize(("activation", "gated", "folded"), [("silu", True, True), ("relu", False, True), ("gelu", False, False)])
def test_channels_behind_a_gate_or_a_relu_go_into_the_up_projection(tmp_path, activation, gated, folded):
    s = transformer(1, D, FF, activation=activation, gated=gated)
    name = next(name for name, weight in s.initializers.items() if list(weight.dims) == [D, FF])
    up = onnx.numpy_helper.to_array(s.initializers[name]).copy()
    up[:, 9] *= 100
    s.initializers[name].CopyFrom(onnx.numpy_helper.from_array(up, name))
    before = lost(s, tmp_path, "smooth=none,row_scale=false")
    after = lost(s, tmp_path, "smooth=feeds,row_scale=false", Feeds.of([X]))
    assert (after < 0.7 * before) == folded


def test_smoothing_alone_changes_nothing(tmp_path):
    """Seen through weights that are rounded finely: with one column a neuron the rest is exact algebra."""
    from ffnfold.passes.base import Context
    from ffnfold.passes.int8.linear_groups import block_groups
    from ffnfold.passes.int8.quantize_unit import Recipe, smooth_units
    from ffnfold.passes.int8.units import Unit

    for gated, activation, pre in itertools.product((False, True), ("relu", "gelu", "silu"), (False, True)):
        s = transformer(1, D, FF, activation=activation, gated=gated) if pre else post_norm(activation=activation, gated=gated)
        onnx.save_model(s.model(), tmp_path / "model.onnx")
        model = Model.load(tmp_path / "model.onnx")
        units = [Unit((0,), block_groups(find_ffn_blocks(model)[0]))]
        smooth_units(model, units, Recipe("dynamic", Rounding(), smooth="feeds", strength=0.9), Context(Feeds.of([X])))
        assert units[0].smoothed, (gated, activation, pre)
        assert drift(run(s.model(), X), run(model, X)) < 2e-6


def test_the_scale_of_least_error_beats_the_largest_number():
    weight = np.random.default_rng(0).standard_t(3, size=(512, 8)).astype(np.float32)
    for rounding in (Rounding(7, 4, 32), Rounding(7, 4, None), Rounding(127, 8, None)):
        errors = {}
        for kind in ("max", "mse"):
            chosen = Rounding(rounding.largest, rounding.bits, rounding.block, kind)
            scales = chosen.scales(weight)
            errors[kind] = ((weight - chosen.codes(weight, scales) * chosen.spread(scales, 512)) ** 2).sum()
        assert errors["mse"] < errors["max"] or (rounding.bits == 8 and errors["mse"] == errors["max"])


def test_a_percentile_clips():
    weight = np.ones((1000, 1), np.float32)
    weight[0] = 100
    rounding = Rounding(scale="percentile", percentile=99)
    assert rounding.scales(weight)[0, 0] == pytest.approx(1 / 127)
    assert rounding.codes(weight, rounding.scales(weight))[0, 0] == 127


def correlated(rows: int, seed: int) -> dict[str, np.ndarray]:
    mixing = np.random.default_rng(0).normal(size=(8, D))
    random = np.random.default_rng(seed)
    return {"x": (random.normal(size=(1, rows, 8)) @ mixing + 0.1 * random.normal(size=(1, rows, D))).astype(np.float32)}


def test_later_roundings_undo_the_error_of_earlier_ones(tmp_path):
    s = transformer(1, D, FF, activation="relu", pre_norm=False)
    fit, other = Feeds.of([correlated(2000, 1)]), correlated(200, 2)
    for options in ("bits=4", "bits=4,block_size=64", "row_scale=true"):
        plain = lost(s, tmp_path, options, feed=other)
        better = lost(s, tmp_path, f"{options},gptq=true", fit, feed=other)
        assert better < (0.7 if "bits" in options else 1.0) * plain, options


def test_the_bias_takes_the_mean_error(tmp_path):
    s = transformer(1, D, FF, activation="relu", pre_norm=False, bias=False)
    feed = {"x": np.abs(X["x"]) + 1}

    def mean_error(options: str) -> float:
        model, _ = quantize(s, tmp_path, options, Feeds.of([feed]))
        return float(np.abs((run(model, feed)["y"] - run(s.model(), feed)["y"]).mean(axis=(0, 1))).mean())

    assert mean_error("bits=4,bias_correction=true") < 0.5 * mean_error("bits=4")


def test_weights_of_seven_bits_where_products_saturate(tmp_path, monkeypatch):
    def largest(options: str = "") -> tuple[int, PassResult]:
        model, result = quantize(transformer(1, D, FF), tmp_path, options)
        weights = [each for each in model.graph.tensors().values() if getattr(each, "dtype", None) == np.int8]
        return max(int(np.abs(each.values.astype(int)).max()) for each in weights), result

    monkeypatch.setattr(quantize_ffn, "products_saturate", lambda: True)
    found, result = largest()
    assert found == 63
    assert "VNNI" in result.notes[0]
    assert largest("reduced_range=false")[0] == 127
    monkeypatch.setattr(quantize_ffn, "products_saturate", lambda: False)
    found, result = largest()
    assert (found, result.notes) == (127, ())
    assert largest("reduced_range=true")[0] == 63


def test_which_processors_saturate():
    assert products_saturate("fpu sse2 avx2 avx512f", "x86_64") is True
    for flag in ("avx512_vnni", "avx_vnni", "amx_int8"):
        assert products_saturate(f"fpu avx2 {flag}", "x86_64") is False
    assert products_saturate("", "aarch64") is False


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32), (8, 128)])
def test_packed_blocks_read_back(bits, block):
    rounding = Rounding(7 if bits == 4 else 127, bits, block)
    weight = np.random.default_rng(1).normal(size=(80, 6)).astype(np.float32)
    scales = rounding.scales(weight)
    codes = rounding.codes(weight, scales)
    packed = pack_nbits(codes, bits, block)
    assert packed.shape == (6, -(-80 // block), block * bits // 8)
    back = dequantize_nbits(packed, np.ascontiguousarray(scales.T).reshape(-1), None, 80, 6, bits, block)
    assert np.array_equal(back, codes * rounding.spread(scales, 80))
    assert np.abs(back - weight).max() <= 0.5001 * np.abs(scales).max() + (np.abs(scales).max() if bits == 4 else 0)


# other linears

def attention() -> Sketch:
    """One layer with q, k, v and out projections, an FFN, a small linear, and a head."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    normed = s.norm(x, D)
    q, k, v = (s.linear(normed, D, 4 * D, name=f"/layer.0/attention/{which}") for which in "qkv")
    scores = s.op("Softmax", s.op("Div", s.op("MatMul", q, s.op("Transpose", k, perm=[0, 2, 1])), s.number(16)), axis=-1)
    mixed = s.linear(s.op("MatMul", scores, v), 4 * D, D, name="/layer.0/attention/out")
    x = s.op("Add", x, mixed)
    x = s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu", name="/layer.0/ffn"))
    s.op("MatMul", s.norm(x, D), s.weight(s.numbers(D, 1000)), out=s.output("logits"), name="/head/MatMul")
    s.op("MatMul", x, s.weight(s.numbers(D, 2)), out=s.output("score"), name="/score/MatMul")
    return s


def test_linears_of_attention(tmp_path):
    s = attention()
    model, result = quantize(s, tmp_path, "also=attention,row_scale=false")
    assert result.fired == 3, "the FFN block, what reads the first norm, the projection behind the heads"
    assert "head" in " ".join(refused.reason for refused in result.refused)
    assert drift(run(s.model(), X), run(model, X)) < 0.03
    ran = executed(tmp_path)
    assert (ran["MatMulIntegerToFloat"], ran["DynamicQuantizeMatMul"], ran["DynamicQuantizeLinear"]) == (3, 3, 1)
    _, result = quantize(s, tmp_path, "also=everything")
    assert result.fired == 4
    assert not result.refused
    _, result = quantize(s, tmp_path, "blocks=none,also=head,row_scale=false")
    assert (result.fired, result.refused) == (1, [])
    assert executed(tmp_path)["DynamicQuantizeMatMul"] == 1


def test_linears_of_attention_in_every_form(tmp_path):
    for options in ("also=attention,smooth=feeds", "also=everything,bits=4", "also=everything,form=weight-only",
                    "also=attention,smooth=feeds,gptq=true,bias_correction=true,scale=mse"):
        assert lost(attention(), tmp_path, options, Feeds.of([X])) < (0.15 if "bits" in options else 0.02), options


def test_attention_in_parallel_shares_the_quantization_of_the_ffn(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    y = s.norm(x, D)
    value = s.linear(y, D, 4 * D, name="/attention/v")
    mixed = s.linear(s.op("Softmax", value, axis=1), 4 * D, D, name="/attention/out")
    branch = s.ffn(y, D, FF, activation="gelu", name="/ffn")
    s.op("Add", s.op("Add", x, mixed), branch, out=s.output("y", ["batch", "tokens", D]))
    _, result = quantize(s, tmp_path, "also=attention,row_scale=false")
    assert result.fired == 2
    assert executed(tmp_path)["DynamicQuantizeLinear"] == 1


# storage

def test_shared_weights_stay_shared(tmp_path):
    s = Sketch()
    x = s.input("x", ["rows", D])
    up, down = s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF, D))
    for _ in range(3):
        x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down))
    s.op("Neg", x, out=s.output("y"))
    for options in ("", "bits=4", "form=weight-only", "smooth=feeds"):
        quantize(s, tmp_path, options, Feeds.of([{"x": X["x"][0]}]))
        weights = sum(np.prod(each.dims) for each in onnx.load(tmp_path / "quantized.onnx").graph.initializer
                      if each.data_type in (TensorProto.INT8, TensorProto.UINT8))
        assert weights <= 2 * D * FF + 100, options


@pytest.mark.parametrize("options", ["", "row_scale=true", "row_scale=false", "form=nbits", "bits=4", "form=weight-only",
                                     "smooth=feeds", "smooth=feeds,gptq=true,bias_correction=true"])
def test_float16(tmp_path, options):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="silu", gated=True), out=s.output("y", ["batch", "tokens", D]))
    feed = {"x": X["x"].astype(np.float16)}
    assert lost(s, tmp_path, options, Feeds.of([feed]), feed) < (0.2 if "bits" in options else 0.02)


@pytest.mark.parametrize("options", ["", "form=nbits", "bits=4", "form=weight-only"])
def test_bfloat16_keeps_its_type_at_the_edges(tmp_path, options):
    """ONNX Runtime multiplies no bfloat16 on a CPU, so what is checked is the graph and what is stored."""
    import ml_dtypes

    s = Sketch(opset=19, dtype=ml_dtypes.bfloat16)
    x = s.input("x", ["rows", D])
    s.op("Add", x, s.ffn(x, D, FF), out=s.output("y", ["rows", D]))
    model, result = quantize(s, tmp_path, options)
    assert result.fired == 1
    onnx.checker.check_model(onnx.load(tmp_path / "quantized.onnx"), full_check="form=weight-only" in options or not options)
    assert find_ffn_blocks(model)[0].quantized


def test_convolutions_and_packed_experts_are_stored_as_integers(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", D, 4, 4])
    hidden = s.op("Relu", s.op("Conv", x, s.weight(s.numbers(FF, D, 1, 1, scale=0.1)), kernel_shape=[1, 1]))
    s.op("Add", x, s.op("Conv", hidden, s.weight(s.numbers(D, FF, 1, 1, scale=0.05)), kernel_shape=[1, 1]), out=s.output("y"))
    feed = {"x": RANDOM.normal(size=(1, D, 4, 4)).astype(np.float32)}
    for options in ("", "bits=4", "smooth=feeds"):
        model, result = quantize(s, tmp_path, options, Feeds.of([feed]))
        assert result.fired == 1
        assert "DequantizeLinear" in ops(model)
        assert drift(run(s.model(), feed), run(model, feed)) < 0.02
        assert any("have 8 bits" in note for note in result.notes) == ("bits=4" in options)


# what it leaves alone

def refusal(s: Sketch, folder: Path, options: str = "") -> str:
    model, result = quantize(s, folder, options)
    assert result.fired == 0
    assert ops(model) == [node.op_type for node in s.nodes]
    return result.refused[0].reason


def test_a_weight_that_is_not_finite(tmp_path):
    s = transformer(1, D, FF)
    name = next(name for name, weight in s.initializers.items() if list(weight.dims) == [FF, D])
    array = onnx.numpy_helper.to_array(s.initializers[name]).copy()
    array[3, 4] = np.inf
    s.initializers[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    for options in ("", "form=nbits", "form=weight-only"):
        assert "not finite" in refusal(s, tmp_path, options)


def test_a_weight_that_the_caller_may_override(tmp_path):
    s = transformer(1, D, FF, pre_norm=False)
    name = next(name for name, weight in s.initializers.items() if list(weight.dims) == [D, FF])
    s.input(name, [D, FF])
    assert "override" in refusal(s, tmp_path)


def test_an_opset_without_dynamic_quantization(tmp_path):
    assert "opset 11" in refusal(transformer(1, D, FF, opset=10, pre_norm=False), tmp_path)


def test_an_opset_without_blocks_of_scales(tmp_path):
    assert "opset 21" in refusal(transformer(1, D, FF, opset=20), tmp_path, "form=weight-only,block_size=32")
    assert lost(transformer(1, D, FF, opset=21), tmp_path, "form=weight-only,block_size=32") < 0.02


def test_a_product_without_its_bias_that_is_an_output_stays(tmp_path):
    s = transformer(1, D, FF, pre_norm=False)
    s.output(next(node.output[0] for node in s.nodes if node.op_type == "MatMul"))
    model, _ = quantize(s, tmp_path)
    before, after = run(s.model(), X), run(model, X)
    assert drift(before, after) < 0.02


def test_a_block_inside_a_subgraph(tmp_path):
    inner = transformer(1, D, FF, activation="relu", pre_norm=False)
    body = helper.make_graph(inner.nodes, "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                             list(inner.initializers.values()))
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["same"])], "else", [],
                              [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)])
    s = Sketch()
    s.input("x", ["batch", "tokens", D])
    flag = s.input("flag", [], TensorProto.BOOL)
    s.op("If", flag, out=s.output("out"), then_branch=body, else_branch=other)
    feed = {**X, "flag": np.asarray(True)}
    for options in ("", "smooth=feeds", "bits=4,gptq=true,bias_correction=true"):
        assert lost(s, tmp_path, options, Feeds.of([feed]), feed) < (0.2 if "bits" in options else 0.02)


def test_measuring_needs_feeds(tmp_path):
    for options in ("smooth=feeds", "gptq=true", "bias_correction=true"):
        with pytest.raises(InputError, match="needs real inputs"):
            quantize(transformer(1, D, FF), tmp_path, options)


# what is left in float, and which form

def test_the_block_that_costs_most_stays_in_float(tmp_path):
    s = transformer(3, D, FF, activation="gelu")
    up, bias, down = ([name for name, weight in s.initializers.items() if list(weight.dims) == shape][1]
                      for shape in ([D, FF], [FF], [FF, D]))
    numbers = {name: onnx.numpy_helper.to_array(s.initializers[name]).copy() for name in (up, bias, down)}
    numbers[up][:, ::7], numbers[bias][::7] = 0, 0
    numbers[down][::7] *= 200  # neurons that are always 0 ruin the scale of every column
    for name, array in numbers.items():
        s.initializers[name].CopyFrom(onnx.numpy_helper.from_array(array, name))
    for options in ("bits=4,block_size=256,keep_float=1", "bits=4,block_size=256,keep_float=0.2,also=attention"):
        model, result = quantize(s, tmp_path, options, Feeds.of([X]))
        assert result.fired == 2
        assert [(refused.block, refused.reason.split(":")[0]) for refused in result.refused] == [(1, "kept in float")]
        assert [block.quantized for block in find_ffn_blocks(model)] == [True, False, True]
    _, result = quantize(s, tmp_path, "keep_float=0.9", Feeds.of([X]))
    assert result.fired == 3


def test_auto_takes_the_fastest_form_and_says_what_it_measured(tmp_path, monkeypatch):
    s = transformer(2, D, FF, activation="gelu")
    for winner, loser in itertools.permutations(("dynamic", "nbits")):
        def measured(sources, feeds, winner=winner, **settings):
            assert [feed["x"].shape for feed in feeds] == [(2, 4, D)]
            operators = [Counter(ops(source)) for source in sources]
            assert operators[0]["MatMul"] == 4
            assert operators[1]["MatMulIntegerToFloat"] == 4
            assert operators[2]["MatMulNBits"] == 4
            speed = {"dynamic": 1.1, "nbits": 1.1, winner: 1.5}
            return {"ratios": [{"speedup": speed[form], "low": speed[form] - 0.05, "high": speed[form] + 0.05}
                               for form in ("dynamic", "nbits")]}

        monkeypatch.setattr(form_choice, "race", measured)
        model, result = quantize(s, tmp_path, "target=auto,shapes=2x4")
        assert result.fired == 2
        assert ("MatMulNBits" in ops(model)) == (winner == "nbits")
        assert f"{loser}: 1.10× (1.05 to 1.15) on 2x4" in result.notes


def test_auto_leaves_the_model_alone_where_every_form_is_slower_somewhere(tmp_path, monkeypatch):
    def measured(sources, feeds, **settings):
        slow = {"speedup": 1.0, "low": 0.97, "high": 1.03}
        fast = {"speedup": 2.0, "low": 1.9, "high": 2.1}
        return {"ratios": [fast, slow] if feeds[0]["x"].shape[1] == 1 else [slow, fast]}

    monkeypatch.setattr(form_choice, "race", measured)
    s = transformer(2, D, FF, activation="gelu")
    model, result = quantize(s, tmp_path, "target=auto,shapes=1x1+8x16")
    assert (result.fired, len(result.refused), len(result.notes)) == (0, 2, 2)
    assert ops(model) == [node.op_type for node in s.nodes]


def test_auto_races_for_real(tmp_path):
    s = transformer(1, 256, 1024, activation="relu")
    _, result = quantize(s, tmp_path, "target=auto,shapes=1x64")
    assert sum(note.startswith(("dynamic: ", "nbits: ")) for note in result.notes) == 2
    assert result.fired or "0.98 times as fast" in result.refused[0].reason


def test_shapes_cut_or_repeat_real_feeds(tmp_path):
    s = transformer(1, D, FF)
    onnx.save_model(s.model(), tmp_path / "model.onnx")
    model = Model.load(tmp_path / "model.onnx")
    specs = input_specs(model)
    cut = form_choice.shaped_feeds(model, specs, (3, 5), Feeds.of([X]))[0]["x"]
    assert np.array_equal(cut, X["x"][[0, 1, 0], :5])
    assert form_choice.shaped_feeds(model, specs, (3,), None)[0]["x"].shape == (3, 128, D)
    with pytest.raises(InputError, match="2 open dimensions"):
        form_choice.shaped_feeds(model, specs, (1, 2, 3), None)


@pytest.mark.parametrize("options", ["gptq=true", "bias_correction=true", "scale=mse", "gptq=true,bias_correction=true"])
def test_statistics_are_known_after_smoothing(tmp_path, options, monkeypatch):
    """One run through the feeds gives what a second one, of the smoothed model, gives."""
    import ffnfold.passes.int8.quantize_unit as quantize_unit

    quantize = quantize_unit.quantize_units
    s = transformer(2, D, FF, activation="relu")
    onnx.save_model(s.model(), tmp_path / "model.onnx")
    feeds, found = Feeds.of([correlated(300, 1), correlated(300, 2)]), []
    for again in (False, True):
        if again:
            monkeypatch.setattr("ffnfold.passes.quantize_ffn.quantize_units", lambda *most: quantize(*most[:-1], {}))
        model = Model.load(tmp_path / "model.onnx")
        run_plan(model, Plan.parse([f"quantize-ffn:smooth=feeds,{options}"]), fit=feeds)
        found.append(run(model, correlated(100, 3)))
    assert drift(*found) < 0.1 * drift(run(s.model(), correlated(100, 3)), found[0])
