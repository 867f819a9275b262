"""quantize-ffn: what ONNX Runtime runs of it, how weights are stored, and what it leaves alone."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.int8 import form_choice
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from ffnfold.runtime.specs import input_specs
from onnx import TensorProto, helper
from quantizing import FF, RANDOM, D, X, executed, lost, post_norm, quantize

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
