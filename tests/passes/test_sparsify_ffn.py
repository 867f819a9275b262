"""sparsify-ffn: where the zeros are, what the update gains, and which blocks it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 16, 48
FIT = feeds_of((8, 16, D), 10, seed=11)
[X] = feeds_of((4, 9, D))


def weights(model: Model) -> list[np.ndarray]:
    return [linear.weight() for block in find_ffn_blocks(model) for linear in block.linears()]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"activation": "silu", "gated": True, "bias": False}])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_part_asked_for_becomes_zero(tmp_path, method, kind, ratio):
    s = transformer(2, D, FF, **kind)
    model, [result] = rewrite(s, tmp_path, f"sparsify-ffn:method={method},ratio={ratio}", fit=FIT)
    assert (result.fired, result.refused) == (2, [])
    for matrix in weights(model):
        assert abs((matrix == 0).mean() - ratio) < 0.01
    assert drift(run(s.model(), X), run(model, X)) < 0.7


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_two_of_every_four(tmp_path, method):
    model, _ = rewrite(transformer(1, D, FF), tmp_path, f"sparsify-ffn:pattern=2:4,method={method}", fit=FIT)
    for matrix in weights(model):
        assert ((matrix.reshape(-1, 4, matrix.shape[1]) == 0).sum(axis=1) == 2).all()


def with_inputs_in_common(s: Sketch) -> str:
    """16 features made of 8 and a little: what one says, others say too."""
    x = s.input("x", ["batch", "tokens", D])
    mixed = s.op("MatMul", x, s.weight(s.numbers(D, 6) @ s.numbers(6, D)))
    return s.op("Add", mixed, s.op("Mul", x, s.number(0.1)))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_other_weights_make_good_for_the_zeros(tmp_path, pattern):
    s = Sketch()
    x = with_inputs_in_common(s)
    s.op("Add", x, s.ffn(x, D, FF, activation="gelu"), out=s.output("y"))
    before, found = run(s.model(), X), {}
    for method in ("wanda", "sparsegpt"):
        model, _ = rewrite(s, tmp_path, f"sparsify-ffn:pattern={pattern},method={method},target=own,weight=none", fit=FIT)
        found[method] = drift(before, run(model, X))
    assert found["sparsegpt"] < 0.7 * found["wanda"]


def test_wanda_keeps_the_weights_of_large_inputs_and_changes_none(tmp_path):
    s = transformer(1, D, FF, pre_norm=False)
    size = np.where(np.arange(D) < D // 2, 100, 0.01).astype(np.float32)
    feeds = [{"x": feed["x"] * size} for feed in FIT]
    before, _ = weights(Model.load(s.save(tmp_path / "model.onnx")))
    model, _ = rewrite(s, tmp_path, "sparsify-ffn:method=wanda,target=own", fit=feeds)
    after, _ = weights(model)
    assert (after[:D // 2] == before[:D // 2]).all()
    assert (after[D // 2:] == 0).all()


def test_weights_that_blocks_share_stay_one(tmp_path):
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    up, bias, down = (s.weight(s.numbers(*shape)) for shape in ((D, FF), (FF,), (FF, D)))
    for _ in range(3):
        hidden = s.activation("gelu", s.op("Add", s.op("MatMul", s.norm(stream, D), up), bias))
        stream = s.op("Add", stream, s.op("MatMul", hidden, down))
    s.op("Identity", stream, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "sparsify-ffn:ratio=0.3", fit=FIT)
    assert (result.fired, result.refused) == (3, [])
    assert [block.shares_weights_with for block in find_ffn_blocks(model)] == [None, 0, 0]
    assert drift(run(s.model(), X), run(model, X)) < 0.4


def test_a_float16_model_stays_one(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu"), out=s.output("y"))
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, "sparsify-ffn:ratio=0.25", fit=feeds)
    after = run(model, feeds[0])
    assert (result.fired, after["y"].dtype) == (1, np.float16)
    assert drift(run(s.model(), feeds[0]), after) < 0.15


def test_inputs_that_are_always_zero_keep_no_weight(tmp_path):
    s = transformer(1, D, FF, pre_norm=False)
    feeds = [{"x": feed["x"] * (np.arange(D) < 12).astype(np.float32)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, "sparsify-ffn:ratio=0.25", fit=feeds)
    assert result.fired == 1
    assert np.isfinite(weights(model)[0]).all()
    assert drift(run(s.model(), feeds[0]), run(model, feeds[0])) < 0.15


def test_a_block_inside_a_branch_cannot_be_measured(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x", D, FF)), ["batch", "tokens", D])
    _, [result] = rewrite(s, tmp_path, "sparsify-ffn", fit=[{**feed, "wanted": np.asarray(True)} for feed in FIT])
    assert result.fired == 0
    assert "subgraph" in result.refused[0].reason


def test_a_width_that_four_does_not_divide(tmp_path):
    _, [result] = rewrite(transformer(1, 10, 30), tmp_path, "sparsify-ffn:pattern=2:4", fit=feeds_of((4, 9, 10), 5))
    assert (result.fired, result.refused[0].reason) == (0, "4 does not divide its 10 inputs")


def test_a_weight_that_something_else_reads(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = s.weight(s.numbers(D, FF))
    s.op("MatMul", x, up, out=s.output("scores"))
    s.op("Add", x, s.linear(s.activation("gelu", s.op("MatMul", x, up)), FF, D), out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, "sparsify-ffn", fit=FIT)
    assert result.fired == 0
    assert "shared with something that stays" in result.refused[0].reason


@pytest.mark.parametrize("text", ["ratio=0", "ratio=1", "pattern=2:4,ratio=0.6", "pattern=1:4", "method=magnitude"])
def test_options_that_make_no_sense(tmp_path, text):
    with pytest.raises(InputError):
        rewrite(transformer(1), tmp_path, f"sparsify-ffn:{text}", fit=FIT)
