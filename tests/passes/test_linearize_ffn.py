"""linearize-ffn: how good the affine function is, on what it is fitted, and which blocks it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 8, 32
FIT = feeds_of((4, 8, D), 10, seed=11)
[X] = feeds_of((2, 5, D))
both = pytest.mark.parametrize("fit", ["affine", "neuron"])


def always_open(gated: bool = False) -> Sketch:
    """A ReLU block whose neurons are all open on inputs of usual size: affine where it is looked at."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = s.op("Add", s.op("MatMul", x, s.weight(0.1 * s.numbers(D, FF))), s.weight(np.full(FF, 5, np.float32)))
    hidden = s.op("Relu", up)
    if gated:
        hidden = s.op("Mul", hidden, s.linear(x, D, FF))
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    return s


def weights(model: Model) -> list[np.ndarray]:
    return [each._values.load() for each in model.graph.constants]


@both
def test_what_is_affine_is_found_exactly(tmp_path, fit):
    s = always_open()
    model, [result] = rewrite(s, tmp_path, f"linearize-ffn:fit={fit}", fit=FIT)
    assert (result.fired, result.refused) == (1, [])
    assert len(find_ffn_blocks(model)) == 0
    assert drift(run(s.model(), X), run(model, X)) < 1e-4


def test_the_affine_map_is_one_matrix(tmp_path):
    model, _ = rewrite(transformer(1), tmp_path, "linearize-ffn", fit=FIT)
    assert ops(model) == ["LayerNormalization", "MatMul", "Add", "Add", "Identity"]
    assert sorted(each.shape for each in weights(model)) == [(D,), (D,), (D,), (D, D)]
    assert (tmp_path / "after.onnx").stat().st_size < (tmp_path / "before.onnx").stat().st_size


def test_the_lines_stand_between_the_two_matrices(tmp_path):
    model, _ = rewrite(transformer(1), tmp_path, "linearize-ffn:fit=neuron", fit=FIT)
    assert ops(model).count("MatMul") == 2
    assert "Relu" not in ops(model)
    assert sorted(each.shape for each in weights(model) if each.size == FF) == [(FF,)] * 3


def test_the_map_is_the_least_squares_one(tmp_path):
    """weight=none and tokens in plenty: what numpy finds from the same values, up to the ridge. x is the residual too,
    so that one matrix does both."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x), out=s.output("y"))
    feeds = feeds_of((16, 64, D), 10, seed=11)
    model, _ = rewrite(s, tmp_path, "linearize-ffn:weight=none", fit=feeds)
    rows = np.concatenate([feed["x"].reshape(-1, D) for feed in feeds]).astype(np.float64)
    values = np.concatenate([run(s.model(), feed)["y"].reshape(-1, D) for feed in feeds]) - rows
    solved, *_ = np.linalg.lstsq(np.hstack([rows, np.ones((len(rows), 1))]), values, rcond=None)
    [matrix] = [each for each in weights(model) if each.shape == (D, D)]
    assert np.linalg.norm(matrix - np.eye(D) - solved[:D]) < 0.05 * np.linalg.norm(solved[:D])
    assert ops(model) == ["MatMul", "Add"]


@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"activation": "silu", "gated": True},
                                  {"activation": "gelu_tanh", "gated": True, "bias": False},
                                  {"activation": "relu", "pre_norm": False}])
def test_it_keeps_more_than_the_mean(tmp_path, kind):
    s = transformer(2, **kind)
    before = run(s.model(), X)
    affine, [result] = rewrite(s, tmp_path, "linearize-ffn", fit=FIT)
    assert result.fired == 2
    mean, _ = rewrite(s, tmp_path, "remove-ffn:keep=mean", fit=FIT)
    assert 0 < drift(before, run(affine, X)) < drift(before, run(mean, X))


def test_a_line_is_fitted_behind_the_blocks_already_rewritten(tmp_path):
    """Block 1, fitted behind what block 0 has become, is the same as fitted on a model in which block 0 is that already."""
    fit = "neuron"
    at_once, _ = rewrite(transformer(2), tmp_path, f"linearize-ffn:fit={fit}", fit=FIT)
    first, _ = rewrite(transformer(2), tmp_path, f"linearize-ffn:fit={fit},blocks=0", fit=FIT)
    onnx_first = onnx.load(tmp_path / "after.onnx")
    in_turn, _ = rewrite(onnx_first, tmp_path, f"linearize-ffn:fit={fit}", fit=FIT)
    assert drift(run(in_turn, X), run(at_once, X)) < 1e-6
    alone, _ = rewrite(transformer(2), tmp_path, f"linearize-ffn:fit={fit},blocks=1", fit=FIT)
    made = [{each.name: each._values.load() for each in model.graph.constants if each.name.startswith("/layer.1/ffn")}
            for model in (at_once, alone)]
    assert list(made[0]) == list(made[1]) != []
    assert max(np.abs(made[0][name] - made[1][name]).max() for name in made[0]) > 1e-3  # by itself it is fitted on other values
    assert len(find_ffn_blocks(first)) == 1


def test_only_the_blocks_asked_for(tmp_path):
    model, [result] = rewrite(transformer(3), tmp_path, "linearize-ffn:blocks=0+2", fit=FIT)
    assert result.fired == 2
    assert [block.name for block in find_ffn_blocks(model)] == ["/layer.1/ffn"]


def test_a_massive_token_does_not_own_the_fit(tmp_path):
    """The first token is 200 times the others; the norm behind the block divides that out again."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    stream = s.op("Add", x, s.ffn(x, activation="gelu"))
    s.op("LayerNormalization", stream, s.weight(np.ones(D, np.float32)), out=s.output("y"))
    feeds = feeds_of((4, 8, D), 10, seed=11)
    for feed in feeds:
        feed["x"][:, 0] *= 200
    before = run(s.model(), X)
    errors = {}
    for weight in ("auto", "none"):
        model, _ = rewrite(s, tmp_path, f"linearize-ffn:weight={weight}", fit=feeds)
        errors[weight] = drift(before, run(model, X))
    assert errors["auto"] < 0.8 * errors["none"]


@both
def test_padding_is_not_fitted_to(tmp_path, fit):
    s = transformer(1)
    s.input("attention_mask", ["batch", "tokens"], onnx.TensorProto.INT64)
    mask = np.ones((4, 8), np.int64)
    mask[:, 5:] = 0
    found = []
    for filling in (0, 1e3):
        feeds = feeds_of((4, 8, D), 10, seed=11, attention_mask=mask)
        for feed in feeds:
            feed["x"][mask == 0] = filling * np.arange(D)
        found.append(rewrite(s, tmp_path, f"linearize-ffn:fit={fit}", fit=feeds)[0])
    feed = {**X, "attention_mask": np.ones((2, 5), np.int64)}
    np.testing.assert_array_equal(run(found[0], feed)["y"], run(found[1], feed)["y"])


@both
def test_the_same_feeds_give_the_same_bytes(tmp_path, fit):
    written = []
    for _ in range(2):
        rewrite(transformer(2), tmp_path, f"linearize-ffn:fit={fit}", fit=FIT)
        written.append((tmp_path / "after.onnx").read_bytes())
    assert written[0] == written[1]


@both
def test_a_block_whose_output_is_an_output_and_read_elsewhere(tmp_path, fit):
    s = always_open()
    branch = s.nodes[-1].input[1]
    s.output(branch, ["batch", "tokens", D])
    s.op("ReduceMax", branch, out=s.output("largest"), keepdims=0)
    model, [result] = rewrite(s, tmp_path, f"linearize-ffn:fit={fit}", fit=FIT)
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) < 1e-4


@both
def test_a_hidden_value_that_is_read_elsewhere_is_still_there(tmp_path, fit):
    s = always_open()
    hidden = next(node.output[0] for node in s.nodes if node.op_type == "Relu")
    s.op("ReduceMean", hidden, out=s.output("probe"), axes=[-1])
    model, [result] = rewrite(s, tmp_path, f"linearize-ffn:fit={fit}", fit=FIT)
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) < 1e-4


@both
def test_weights_that_another_block_reads_stay(tmp_path, fit):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down = s.weight(s.numbers(D, FF), "up"), s.weight(s.numbers(FF, D), "down")
    for number in range(2):
        x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down), out=f"stream_{number}")
    s.op("Identity", x, out=s.output("y"))
    model, _ = rewrite(s, tmp_path, f"linearize-ffn:fit={fit},blocks=0,heal=false", fit=FIT)
    kept = {each.name: each._values.load() for each in model.graph.constants}
    for name, before in (("up", s.initializers["up"]), ("down", s.initializers["down"])):
        np.testing.assert_array_equal(kept[name], onnx.numpy_helper.to_array(before))
    [block] = find_ffn_blocks(model)
    assert block.output.name == s.nodes[-2].input[1]


@both
def test_half_precision(tmp_path, fit):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x, activation="gelu"), out=s.output("y"))
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, f"linearize-ffn:fit={fit}", fit=feeds)
    assert result.fired == 1
    assert {each.dtype for each in weights(model)} == {np.dtype(np.float16)}
    after = run(model, feeds[0])["y"]
    assert after.dtype == np.float16
    assert np.isfinite(after).all()


def test_a_block_of_convolutions(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", D, "h", "w"])
    up = s.op("Conv", x, s.weight(s.numbers(FF, D, 1, 1)), s.weight(s.numbers(FF)), kernel_shape=[1, 1])
    down = s.op("Conv", s.op("Relu", up), s.weight(s.numbers(D, FF, 1, 1)), kernel_shape=[1, 1])
    s.op("Add", x, down, out=s.output("y"))
    feeds = feeds_of((2, D, 6, 6), 10, seed=11)
    model, [result] = rewrite(s, tmp_path, "linearize-ffn", fit=feeds)
    assert result.fired == 1
    assert ops(model) == ["Conv"]
    assert 0 < drift(run(s.model(), feeds[0]), run(model, feeds[0])) < 0.5


def refused(s: Sketch, folder, words: str, plan: str = "linearize-ffn", fit=FIT) -> None:
    model, [result] = rewrite(s, folder, plan, fit=fit)
    assert result.fired == 0
    assert words in result.refused[0].reason
    assert ops(model) == ops(s.model())


def test_too_few_tokens(tmp_path):
    refused(transformer(1), tmp_path, "7 tokens are too few for 8 inputs", fit=feeds_of((1, 7, D)))


def test_a_gated_block_has_no_lines(tmp_path):
    refused(transformer(1, gated=True), tmp_path, "fit=affine works", "linearize-ffn:fit=neuron")


def test_a_norm_over_the_neurons_has_no_lines(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.norm(s.op("Relu", s.linear(x, D, FF)), FF)
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    refused(s, tmp_path, "norm over the neurons", "linearize-ffn:fit=neuron")


def test_an_activation_fused_into_the_projection_has_no_lines(tmp_path):
    s = Sketch()
    x = s.input("x", ["rows", D])
    hidden = s.op("FusedGemm", x, s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF)), domain="com.microsoft", activation="Relu")
    s.op("Add", x, s.op("Gemm", hidden, s.weight(s.numbers(FF, D)), s.weight(s.numbers(D))), out=s.output("y"))
    feeds = feeds_of((32, D), 10, seed=11)
    refused(s, tmp_path, "fused into the projection", "linearize-ffn:fit=neuron", feeds)
    model, [result] = rewrite(s, tmp_path, "linearize-ffn", fit=feeds)
    assert result.fired == 1
    assert "FusedGemm" not in ops(model)


def test_packed_experts(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    chosen = s.input("expert", [], onnx.TensorProto.INT64)
    up, down = (s.op("Gather", s.weight(s.numbers(3, *shape)), chosen) for shape in ((D, FF), (FF, D)))
    s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down), out=s.output("y"))
    refused(s, tmp_path, "packed", fit=[{**feed, "expert": np.asarray(1)} for feed in FIT])


@both
def test_a_block_inside_an_if(tmp_path, fit):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x")), ["batch", "tokens", D])
    refused(s, tmp_path, "subgraph", f"linearize-ffn:fit={fit}", [{**feed, "wanted": np.asarray(True)} for feed in FIT])


@both
def test_without_feeds_nothing_runs(tmp_path, fit):
    with pytest.raises(InputError, match="needs real inputs"):
        rewrite(transformer(1), tmp_path, f"linearize-ffn:fit={fit}")
    assert not (tmp_path / "after.onnx").exists()


@pytest.mark.parametrize(("options", "said"), [("fit=cubic", "choose one of affine, stein, neuron"),
                                               ("weight=1", "choose one of auto, none")])
def test_options_that_make_no_sense(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        rewrite(transformer(1), tmp_path, f"linearize-ffn:{options}", fit=FIT)
