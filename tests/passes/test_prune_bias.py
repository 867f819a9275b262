"""prune-bias: biases go, and the mean of what they did stays."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from layer_graphs import layers
from rewriting import Branch, feeds_of, in_branch, rewrite

D = 8
FEEDS = feeds_of((2, 40, D), 10, seed=11)
[X] = feeds_of((2, 5, D))


def biases(model: Model) -> list[tuple[bool, bool]]:
    """For each block whether it has biases in front of and behind its activation."""
    return [(block.up.has_bias or bool(block.gate and block.gate.has_bias), block.down.has_bias)
            for block in find_ffn_blocks(model)]


@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {}, {"gated": True, "activation": "silu"}])
def test_biases_in_front_of_the_activation_go_into_the_one_behind(tmp_path, kind):
    s = transformer(2, **kind)
    lost = {}
    for fold in ("true", "false"):
        model, [result] = rewrite(s, tmp_path, f"prune-bias:which=up,below=,fold={fold}", fit=FEEDS)
        assert (result.fired, result.refused) == (2, [])
        assert biases(model) == [(False, True)] * 2
        lost[fold] = drift(run(s.model(), X), run(model, X))
    assert 1e-4 < lost["true"] < lost["false"]


def test_the_mean_of_the_output_stays(tmp_path):
    s = transformer(1, activation="gelu")
    model, _ = rewrite(s, tmp_path, "prune-bias:which=up,below=", fit=FEEDS)
    before, after = (np.concatenate([run(source, feed)["y"] for feed in FEEDS]).reshape(-1, D).mean(axis=0)
                     for source in (s.model(), model))
    without, _ = rewrite(s, tmp_path, "prune-bias:which=up,below=,fold=false", fit=FEEDS)
    plain = np.concatenate([run(without, feed)["y"] for feed in FEEDS]).reshape(-1, D).mean(axis=0)
    assert np.abs(after - before).max() < 0.3 * np.abs(plain - before).max()


def test_only_what_hardly_varies_goes(tmp_path):
    s = transformer(2, activation="gelu")
    bias = next(node for node in s.nodes if node.name == "/layer.1/ffn/up/Add").input[1]
    s.weight(np.full(32, 1e-4, np.float32), bias)
    model, [result] = rewrite(s, tmp_path, "prune-bias:which=up", fit=FEEDS)
    assert result.fired == 1
    assert biases(model) == [(True, True), (False, True)]
    assert "vary the stream by" in result.refused[0].reason
    assert drift(run(s.model(), X), run(model, X)) < 1e-3


def test_behind_a_post_norm_the_shift_takes_it(tmp_path):
    s = layers("post", 2)
    model, [result] = rewrite(s, tmp_path, "prune-bias:which=down,below=", fit=FEEDS)
    assert result.fired == 2
    assert biases(model) == [(True, False)] * 2
    plain, _ = rewrite(s, tmp_path, "prune-bias:which=down,below=,fold=false", fit=FEEDS)
    assert drift(run(s.model(), X), run(model, X)) < 0.7 * drift(run(s.model(), X), run(plain, X))


@pytest.mark.parametrize("kind", ["parallel", "parallel-in-turn"])
def test_beside_attention_it_goes_for_nothing(tmp_path, kind):
    s = layers(kind, 2)
    model, [result] = rewrite(s, tmp_path, "prune-bias:which=down,below=0", fit=FEEDS)
    assert result.fired == 2
    assert biases(model) == [(True, False)] * 2
    assert drift(run(s.model(), X), run(model, X)) < 1e-5


def test_in_pre_norm_layers_the_next_bias_on_the_stream_takes_it(tmp_path):
    s = layers("pre", 2)
    model, [result] = rewrite(s, tmp_path, "prune-bias:which=down,below=,blocks=0", fit=FEEDS)
    assert result.fired == 1
    assert biases(model) == [(True, False), (True, True)]
    plain, _ = rewrite(s, tmp_path, "prune-bias:which=down,below=,blocks=0,fold=false", fit=FEEDS)
    assert drift(run(s.model(), X), run(model, X)) < 0.9 * drift(run(s.model(), X), run(plain, X))


def test_a_last_block_has_no_bias_behind_it(tmp_path):
    model, [result] = rewrite(layers("pre", 1), tmp_path, "prune-bias:which=down,below=", fit=FEEDS)
    assert (result.fired, result.refused[0].reason) == (0, "there is no bias behind it to take the mean")
    assert biases(model) == [(True, True)]


def test_both_together(tmp_path):
    s = layers("post", 2, activation="gelu")
    model, [result] = rewrite(s, tmp_path, "prune-bias:below=", fit=FEEDS)
    assert result.fired == 2
    assert biases(model) == [(False, False)] * 2
    plain, _ = rewrite(s, tmp_path, "prune-bias:below=,fold=false", fit=FEEDS)
    assert drift(run(s.model(), X), run(model, X)) < drift(run(s.model(), X), run(plain, X))


@pytest.mark.parametrize("op", ["BiasGelu", "FastGelu"])
def test_a_bias_inside_the_activation(tmp_path, op):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.op(op, s.op("MatMul", x, s.weight(s.numbers(D, 32))), s.weight(s.numbers(32, scale=1e-3)), domain="com.microsoft")
    s.op("Add", x, s.linear(hidden, 32, D), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "prune-bias", fit=FEEDS)
    assert result.fired == 1
    assert (op in ops(model)) == (op == "FastGelu")
    assert not next(iter(find_ffn_blocks(model))).up.has_bias
    assert drift(run(s.model(), X), run(model, X)) < 1e-3


def test_in_a_gemm_and_in_front_of_a_skip_norm(tmp_path):
    s = Sketch()
    x = s.input("x", ["tokens", D])
    hidden = s.op("Relu", s.op("Gemm", x, s.weight(s.numbers(D, 32)), s.weight(s.numbers(32, scale=1e-3)), beta=2.0))
    y = s.op("MatMul", hidden, s.weight(s.numbers(32, D)))
    s.op("SkipLayerNormalization", x, y, s.weight(1 + s.numbers(D, scale=0.1)), s.weight(s.numbers(D)), s.weight(s.numbers(D)),
         domain="com.microsoft", epsilon=1e-5, out=s.output("y"))
    feeds = [{"x": feed["x"][0]} for feed in FEEDS]
    model, [result] = rewrite(s, tmp_path, "prune-bias", fit=feeds)
    assert result.fired == 1
    assert not next(iter(find_ffn_blocks(model))).up.has_bias
    assert drift(run(s.model(), feeds[0]), run(model, feeds[0])) < 2e-3


def test_a_constant_that_two_blocks_share_changes_for_one(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, low = s.weight(s.numbers(32, scale=1e-3)), s.weight(s.numbers(D))
    for _ in range(2):
        hidden = s.op("Relu", s.op("Add", s.op("MatMul", x, s.weight(s.numbers(D, 32))), up))
        x = s.op("Add", x, s.op("Add", s.op("MatMul", hidden, s.weight(s.numbers(32, D))), low))
    s.op("Identity", x, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "prune-bias:which=up,blocks=0", fit=FEEDS)
    assert result.fired == 1
    assert biases(model) == [(False, True), (True, True)]
    assert drift(run(s.model(), X), run(model, X)) < 1e-3


def test_half_precision(tmp_path):
    feeds = feeds_of((2, 40, D), 4, dtype=np.float16)
    s = layers("post", 1, dtype=np.float16)
    model, [result] = rewrite(s, tmp_path, "prune-bias:below=", fit=feeds)
    assert result.fired == 1
    after = run(model, feeds[0])["y"]
    assert after.dtype == np.float16
    assert drift(run(s.model(), feeds[0]), {"y": after}) < 0.5


def no_bias() -> Sketch:
    return transformer(1, bias=False)


def output_of_block() -> Sketch:
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    y = s.ffn(x, bias=False)
    y = s.op("Add", y, s.weight(s.numbers(D)), out=s.output("branch"))
    s.norm(s.op("Add", x, y), D)
    s.nodes[-1].output[0] = s.output("y")
    return s


@pytest.mark.parametrize(("draw", "said"), [(no_bias, "no bias that could be taken out"), (output_of_block, "no bias behind it")])
def test_what_stays(tmp_path, draw, said):
    model, [result] = rewrite(draw(), tmp_path, "prune-bias:below=", fit=FEEDS)
    assert result.fired == 0
    assert said in result.refused[0].reason
    assert drift(run(draw().model(), X), run(model, X)) < 1e-6


def test_a_block_inside_an_if_stays(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x")), ["batch", "tokens", D])
    _, [result] = rewrite(s, tmp_path, "prune-bias", fit=[{**X, "wanted": np.asarray(True)}])
    assert result.fired == 0
    assert "subgraph main/" in result.refused[0].reason


@pytest.mark.parametrize(("options", "said"), [("below=-1", "0 or more"), ("which=gate", "choose one of up, down, all")])
def test_options_that_make_no_sense(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        rewrite(transformer(1), tmp_path, f"prune-bias:{options}")
    with pytest.raises(InputError, match="needs real inputs"):
        rewrite(transformer(1), tmp_path, "prune-bias")
