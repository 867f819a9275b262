"""bilinear-ffn: the activation goes, and what is fitted in its place."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 16, 48
FIT = feeds_of((8, 16, D), 10, seed=11)
[X] = feeds_of((4, 9, D))
GATED = {"activation": "silu", "gated": True}


def always_on(*, gated: bool) -> Sketch:
    """ReLU on numbers that are all above zero is a line."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    z = s.op("Add", s.op("MatMul", x, s.weight(0.1 * s.numbers(D, FF))), s.number(1))
    hidden = s.activation("relu", z)
    if gated:
        hidden = s.op("Mul", hidden, s.linear(x, D, FF))
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    return s


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("refit", ["none", "ridge"])
def test_what_is_a_line_already_loses_nothing(tmp_path, gated, refit):
    s = always_on(gated=gated)
    model, [result] = rewrite(s, tmp_path, f"bilinear-ffn:refit={refit}", fit=FIT)
    assert (result.fired, result.refused) == (1, [])
    assert "Relu" not in ops(model)
    assert drift(run(s.model(), X), run(model, X)) < 1e-4


@pytest.mark.parametrize("kind", [{**GATED}, {**GATED, "bias": False}, {"activation": "gelu"},
                                  {"activation": "gelu_tanh", "gated": True, "pre_norm": False}])
@pytest.mark.parametrize("refit", ["none", "ridge"])
def test_no_activation_is_left(tmp_path, kind, refit):
    s = transformer(2, D, FF, **kind)
    model, [result] = rewrite(s, tmp_path, f"bilinear-ffn:refit={refit}", fit=FIT)
    assert (result.fired, result.refused) == (2, [])
    assert not {"Erf", "Sigmoid", "Tanh"} & set(ops(model))
    assert drift(run(s.model(), X), run(model, X)) < 0.5


def test_a_fitted_down_projection_uses_all_products(tmp_path):
    """48 products of two numbers of four: together they say every product there is."""
    s = transformer(1, 4, FF, **GATED)
    x, fit = feeds_of((4, 9, 4))[0], feeds_of((8, 16, 4), 10, seed=11)
    before, found = run(s.model(), x), {}
    for refit in ("none", "ridge"):
        model, _ = rewrite(s, tmp_path, f"bilinear-ffn:refit={refit}", fit=fit)
        found[refit] = drift(before, run(model, x))
    assert found["ridge"] < 0.9 * found["none"]


def test_a_gated_block_stays_one(tmp_path):
    """It is a product of two linears now, and later passes may have it."""
    model, results = rewrite(transformer(1, D, FF, **GATED), tmp_path, "bilinear-ffn", "slim-ffn:keep=16", fit=FIT)
    assert [each.fired for each in results] == [1, 1]
    [block] = find_ffn_blocks(model)
    assert (block.gated, block.d_ff) == (True, 32)


def test_a_bilinear_block_is_more_than_an_affine_map(tmp_path):
    s = transformer(1, D, FF, **GATED)
    before = run(s.model(), X)
    bilinear, _ = rewrite(s, tmp_path, "bilinear-ffn", fit=FIT)
    affine, _ = rewrite(s, tmp_path, "linearize-ffn", fit=FIT)
    assert drift(before, run(bilinear, X)) < 0.7 * drift(before, run(affine, X))


def test_an_ungated_block_becomes_one_matrix(tmp_path):
    s = transformer(1, D, FF, activation="gelu")
    model, results = rewrite(s, tmp_path, "bilinear-ffn", "fuse-matmul", "remove-ffn:keep=nothing", fit=FIT)
    assert [each.fired for each in results] == [1, 1, 0]
    assert results[2].refused[0].reason == "made affine by bilinear-ffn earlier in the plan"
    assert ops(model).count("MatMul") == 1
    affine, _ = rewrite(s, tmp_path, "linearize-ffn", fit=FIT)
    assert drift(run(affine, X), run(model, X)) < 0.05  # the same map, but for the ridge


def test_a_narrow_block_stays_two_thin_matrices(tmp_path):
    s = transformer(1, 32, 8, activation="gelu")
    model, results = rewrite(s, tmp_path, "bilinear-ffn", "fuse-matmul", fit=feeds_of((8, 16, 32), 10))
    assert [each.fired for each in results] == [1, 0]
    assert ops(model).count("MatMul") == 2


def test_a_fused_gate_up(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    both = s.op("MatMul", s.norm(x, D), s.weight(s.numbers(D, 2 * FF)))
    s.op("Split", both, s.weight(np.asarray([FF, FF])), out=["gate", "up"], axis=-1)
    s.op("Add", x, s.linear(s.op("Mul", s.activation("silu", "gate"), "up"), FF, D), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "bilinear-ffn", fit=FIT)
    assert result.fired == 1
    assert "Sigmoid" not in ops(model)
    assert drift(run(s.model(), X), run(model, X)) < 0.25


def test_convolutions(tmp_path):
    s = Sketch()
    x = s.op("Transpose", s.input("x", ["batch", "tokens", D]), perm=[0, 2, 1])
    up, gate = (s.op("Conv", x, s.weight(s.numbers(FF, D, 1) / 3), s.weight(s.numbers(FF))) for _ in range(2))
    y = s.op("Conv", s.op("Mul", s.activation("silu", gate), up), s.weight(s.numbers(D, FF, 1)), s.weight(s.numbers(D)))
    s.op("Transpose", s.op("Add", x, y), perm=[0, 2, 1], out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "bilinear-ffn", fit=FIT)
    assert (result.fired, result.refused) == (1, [])
    assert drift(run(s.model(), X), run(model, X)) < 0.3


def test_a_weight_that_something_else_reads_stays(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, gate = s.weight(s.numbers(D, FF)), s.weight(s.numbers(D, FF))
    s.op("MatMul", x, gate, out=s.output("scores"))
    hidden = s.op("Mul", s.activation("silu", s.op("MatMul", x, gate)), s.op("MatMul", x, up))
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "bilinear-ffn", fit=FIT)
    assert result.fired == 1
    assert drift({"scores": run(s.model(), X)["scores"]}, {"scores": run(model, X)["scores"]}) == 0


def test_a_float16_model_stays_one(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(s.norm(x, D), D, FF, **GATED), out=s.output("y"))
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, "bilinear-ffn", fit=feeds)
    after = run(model, feeds[0])
    assert (result.fired, after["y"].dtype) == (1, np.float16)
    assert drift(run(s.model(), feeds[0]), after) < 0.3


def test_a_block_inside_a_branch_cannot_be_measured(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x", D, FF)), ["batch", "tokens", D])
    _, [result] = rewrite(s, tmp_path, "bilinear-ffn", fit=[{**feed, "wanted": np.asarray(True)} for feed in FIT])
    assert result.fired == 0
    assert "subgraph" in result.refused[0].reason


def test_a_block_without_activation_is_left_alone(tmp_path):
    s = transformer(1, D, FF, activation="identity", gated=True)
    _, [result] = rewrite(s, tmp_path, "bilinear-ffn", fit=FIT)
    assert (result.fired, result.refused[0].reason) == (0, "it has no activation")


def test_options_that_make_no_sense(tmp_path):
    with pytest.raises(InputError):
        rewrite(transformer(1), tmp_path, "bilinear-ffn:refit=bias", fit=FIT)
