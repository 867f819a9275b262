"""linearize-ffn:fit=stein: the least-squares map for Gaussian inputs, from few tokens."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.stein import mean_jacobian
from ffnfold.runtime import Moments
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 8, 32
FIT = feeds_of((4, 8, D), 10, seed=11)
[X] = feeds_of((2, 5, D))


def block_of(s: Sketch, tmp_path):
    onnx.save_model(s.model(), tmp_path / "before.onnx")
    [block] = find_ffn_blocks(Model.load(tmp_path / "before.onnx"))
    return block


def one_block(d: int = D, ff: int = FF, **kind) -> Sketch:
    s = Sketch()
    x = s.input("x", ["batch", "tokens", d])
    s.op("Add", x, s.ffn(x, d, ff, **kind), out=s.output("y"))
    return s


@pytest.mark.parametrize("kind", [{"activation": "relu"}, {"activation": "gelu"}, {"activation": "silu", "gated": True},
                                  {"activation": "gelu_tanh", "gated": True, "bias": False}])
def test_it_is_the_least_squares_map_of_gaussian_inputs(tmp_path, kind):
    """Against numpy's on 100,000 correlated Gaussian rows that the model itself was run on."""
    s = one_block(**kind)
    random = np.random.default_rng(5)
    mixing, shift = random.standard_normal((D, D)), 0.5 * random.standard_normal(D)
    rows = (random.standard_normal((100_000, D)) @ mixing + shift).astype(np.float32)
    values = run(s.model(), {"x": rows[None]})["y"][0] - rows.astype(np.float64)
    solved, *_ = np.linalg.lstsq(np.hstack([rows, np.ones((len(rows), 1))]), values, rcond=None)
    moments = Moments()
    moments.update(rows)
    found = mean_jacobian(block_of(s, tmp_path), moments)
    centred = rows - rows.mean(axis=0)
    assert np.linalg.norm(centred @ (found - solved[:D])) < 0.02 * np.linalg.norm(centred @ solved[:D])


def test_an_activation_without_a_name(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    z = s.linear(x, D, FF)
    hidden = s.op("Mul", s.op("Sin", z), s.op("Sigmoid", z))
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    block = block_of(s, tmp_path)
    assert block.activation.name == "custom"
    moments = Moments()
    rows = np.random.default_rng(5).standard_normal((100_000, D)).astype(np.float32)
    moments.update(rows)
    values = run(s.model(), {"x": rows[None]})["y"][0] - rows.astype(np.float64)
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    solved, *_ = np.linalg.lstsq(centred, values - values.mean(axis=0), rcond=None)
    assert np.linalg.norm(centred @ (mean_jacobian(block, moments) - solved)) < 0.03 * np.linalg.norm(centred @ solved)


@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"activation": "silu", "gated": True}])
def test_few_tokens_will_do(tmp_path, kind):
    """48 tokens for 32 inputs: better than the least-squares map of the same tokens."""
    s = one_block(32, 64, **kind)
    fit, [fresh] = feeds_of((1, 6, 32), 8, seed=11), feeds_of((8, 64, 32))
    before = run(s.model(), fresh)
    errors = {}
    for how in ("affine", "stein"):
        model, [result] = rewrite(s, tmp_path, f"linearize-ffn:fit={how}", fit=fit)
        assert result.fired == 1
        errors[how] = drift(before, run(model, fresh))
    assert errors["stein"] < 0.95 * errors["affine"]


def test_fewer_tokens_than_inputs(tmp_path):
    s = one_block(32, 64, activation="gelu")
    few, [fresh] = feeds_of((1, 5, 32), 2, seed=11), feeds_of((8, 64, 32))
    _, [result] = rewrite(s, tmp_path, "linearize-ffn:fit=affine", fit=few)
    assert result.fired == 0
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:fit=stein", fit=few)
    assert result.fired == 1
    mean, _ = rewrite(s, tmp_path, "remove-ffn:keep=mean", fit=few)
    before = run(s.model(), fresh)
    assert drift(before, run(model, fresh)) < 0.8 * drift(before, run(mean, fresh))


@pytest.mark.parametrize("gated", [False, True])
def test_what_is_affine_is_found_exactly(tmp_path, gated):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = s.op("Add", s.op("MatMul", x, s.weight(0.1 * s.numbers(D, FF))), s.weight(np.full(FF, 8, np.float32)))
    hidden = s.op("Relu", up)
    if gated:  # the gate stands still
        gate = s.op("Add", s.op("MatMul", x, s.weight(np.zeros((D, FF), np.float32))), s.weight(s.numbers(FF, scale=1)))
        hidden = s.op("Mul", s.op("Sigmoid", gate), s.linear(x, D, FF))
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:fit=stein", fit=FIT)
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) < 1e-4


@pytest.mark.parametrize("kind", [{}, {"pre_norm": False}, {"gated": True, "activation": "silu"}])
def test_behind_one_another_it_keeps_more_than_the_mean(tmp_path, kind):
    s = transformer(2, **kind)
    before = run(s.model(), X)
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:fit=stein", fit=FIT)
    assert (result.fired, result.refused) == (2, [])
    assert ops(model).count("MatMul") == 2
    mean, _ = rewrite(s, tmp_path, "remove-ffn:keep=mean", fit=FIT)
    assert 0 < drift(before, run(model, X)) < drift(before, run(mean, X))


def test_half_precision(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x, activation="gelu"), out=s.output("y"))
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:fit=stein", fit=feeds)
    assert result.fired == 1
    after = run(model, feeds[0])["y"]
    assert after.dtype == np.float16
    assert drift(run(s.model(), feeds[0]), {"y": after}) < 0.5


def test_the_same_feeds_give_the_same_bytes(tmp_path):
    written = []
    for _ in range(2):
        rewrite(transformer(2, gated=True), tmp_path, "linearize-ffn:fit=stein", fit=FIT)
        written.append((tmp_path / "after.onnx").read_bytes())
    assert written[0] == written[1]


def refused(s: Sketch, folder, words: str, fit=FIT) -> None:
    model, [result] = rewrite(s, folder, "linearize-ffn:fit=stein", fit=fit)
    assert result.fired == 0
    assert words in result.refused[0].reason
    assert ops(model) == ops(s.model())


def test_one_token_is_not_enough(tmp_path):
    refused(one_block(), tmp_path, "one token has no variance", feeds_of((1, 1, D)))


def test_a_norm_over_the_neurons(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.norm(s.op("Relu", s.linear(x, D, FF)), FF)
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    refused(s, tmp_path, "norm over the neurons")


def test_packed_experts(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    chosen = s.input("expert", [], onnx.TensorProto.INT64)
    up, down = (s.op("Gather", s.weight(s.numbers(3, *shape)), chosen) for shape in ((D, FF), (FF, D)))
    s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down), out=s.output("y"))
    refused(s, tmp_path, "packed", [{**feed, "expert": np.asarray(1)} for feed in FIT])


def test_a_block_inside_an_if(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x")), ["batch", "tokens", D])
    refused(s, tmp_path, "subgraph", [{**feed, "wanted": np.asarray(True)} for feed in FIT])
