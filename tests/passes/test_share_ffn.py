"""share-ffn: alike blocks share weights, and each has its own fix."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.likeness import choose_keepers
from onnx import numpy_helper
from rewriting import Branch, feeds_of, in_branch, rewrite

D = 8
FEEDS = feeds_of((2, 30, D), 10, seed=11)
[X] = feeds_of((2, 5, D))


def copied(s: Sketch, source: int, target: int, change: float = 0.0) -> None:
    """Give block ``target`` the weights of block ``source``, each multiplied by 1 + change · noise."""
    nodes = {node.name: node for node in s.nodes}
    for part in ("up/MatMul", "up/Add", "gate/MatMul", "gate/Add", "down/MatMul", "down/Add"):
        if f"/layer.{source}/ffn/{part}" in nodes:
            from_, to = (nodes[f"/layer.{number}/ffn/{part}"].input[1] for number in (source, target))
            held = numpy_helper.to_array(s.initializers[from_])
            s.weight((held * (1 + change * s.numbers(*held.shape, scale=1))).astype(held.dtype), to)


def weights(model: Model) -> set[tuple[object, ...]]:
    """The distinct sets of weights of the blocks."""
    return {tuple(id(linear.source) for linear in block.linears()) for block in find_ffn_blocks(model)}


@pytest.mark.parametrize("kind", [{}, {"gated": True, "activation": "silu"}, {"pre_norm": False}, {"activation": "gelu"}])
@pytest.mark.parametrize("fix", ["none", "scale", "affine"])
def test_equal_blocks_share_weights_and_give_the_same(tmp_path, fix, kind):
    s = transformer(3, **kind)
    copied(s, 0, 2)
    model, [result] = rewrite(s, tmp_path, f"share-ffn:groups=2,fix={fix}", fit=FEEDS)
    assert (result.fired, result.refused) == (1, [])
    assert drift(run(s.model(), X), run(model, X)) < 2e-3
    if fix == "none":
        assert drift(run(s.model(), X), run(model, X)) < 1e-5
        assert len(weights(model)) == 2
        assert (tmp_path / "after.onnx").stat().st_size < (tmp_path / "before.onnx").stat().st_size
    assert sum(each.shape in ((D, 32), (32, D)) for each in model.graph.constants) == (6 if kind.get("gated") else 4)


def test_the_blocks_that_are_alike_are_tied(tmp_path):
    s = transformer(4, activation="gelu")
    copied(s, 1, 3, 0.02)
    model, [result] = rewrite(s, tmp_path, "share-ffn:groups=3,fix=none", fit=FEEDS)
    assert result.notes in (("block 3: the weights of block 1",), ("block 1: the weights of block 3",))
    assert drift(run(s.model(), X), run(model, X)) < 0.1
    first = {block.index: block.shares_weights_with for block in find_ffn_blocks(model)}
    assert first == {0: None, 1: None, 2: None, 3: 1}


def test_the_fix_loses_less_than_none(tmp_path):
    s = transformer(4, activation="gelu")
    lost = {}
    for fix in ("none", "scale", "affine"):
        model, [result] = rewrite(s, tmp_path, f"share-ffn:groups=2,fix={fix}", fit=FEEDS)
        assert result.fired == 2
        lost[fix] = drift(run(s.model(), X), run(model, X)) ** 2
    assert lost["affine"] < 0.5 * lost["none"]
    assert lost["scale"] < lost["none"]


def test_the_fix_undoes_what_is_affine(tmp_path):
    """Block 1 is block 0 with another output: f_1(x) = 2 f_0(x) + x A."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down, beside = s.numbers(D, 32), s.numbers(32, D), s.numbers(D, D)
    x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, s.weight(up))), s.weight(down)))
    wide = s.op("MatMul", x, s.weight(np.concatenate([up, np.eye(D), -np.eye(D)], axis=1).astype(np.float32)))
    rows = np.concatenate([2 * down, beside, -beside]).astype(np.float32)
    s.op("Add", x, s.op("MatMul", s.op("Relu", wide), s.weight(rows)), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "share-ffn:groups=1", fit=FEEDS)
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) < 1e-3


def test_a_tied_block_and_the_one_it_is_tied_to_are_closed_to_later_passes(tmp_path):
    s = transformer(3, activation="gelu")
    copied(s, 0, 1)
    _, [_, result] = rewrite(s, tmp_path, "share-ffn:groups=2", "quantize-ffn", fit=FEEDS)
    assert result.fired == 1
    assert [each.reason for each in result.refused] == ["other blocks are tied to its weights by share-ffn earlier in the plan",
                                                        "tied to block 0 by share-ffn earlier in the plan"]


def test_blocks_far_apart_are_not_compared_and_enough_groups_are_left_alone():
    cost = {(0, 1): 5.0, (1, 0): 4.0, (1, 2): 1.0, (2, 1): 2.0}
    assert choose_keepers(cost, [0, 1, 2], 2) == {2: 1}
    assert choose_keepers(cost, [0, 1, 2], 1) == {0: 1, 2: 1}
    assert choose_keepers(cost, [0, 1, 2], 3) == {}
    assert choose_keepers({(0, 1): 1.0}, [0, 1, 9], 1) == {1: 0}


def test_nothing_to_share(tmp_path):
    s = transformer(1)
    model, [result] = rewrite(s, tmp_path, "share-ffn:groups=1", fit=FEEDS)
    assert result.fired == 0
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_what_is_shared_already_stays(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down = s.weight(s.numbers(D, 32)), s.weight(s.numbers(32, D))
    for _ in range(2):
        x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down))
    s.op("Add", x, s.ffn(x), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "share-ffn:groups=1", fit=FEEDS)
    assert result.fired == 1
    assert [(each.block, each.reason) for each in result.refused] == [(1, "it shares its weights with block 0 already")]
    assert "Relu" in {node.op for node in model.graph.nodes}


def test_too_few_tokens_for_the_fix(tmp_path):
    s = transformer(2)
    model, [result] = rewrite(s, tmp_path, "share-ffn:groups=1", fit=[X])
    assert result.fired == 0
    assert result.refused[0].reason == "10 tokens are too few for 16 features: give more feeds"
    assert drift(run(s.model(), X), run(model, X)) < 1e-6
    assert len(model.graph.nodes) == len(s.nodes)


def test_half_precision(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    for number in range(2):
        x = s.op("Add", x, s.ffn(s.norm(x, D), name=f"/layer.{number}/ffn"))
    s.op("Identity", x, out=s.output("y"))
    copied(s, 0, 1)
    feeds = feeds_of((2, 30, D), 10, dtype=np.float16)
    for fix in ("affine", "scale", "none"):
        model, [result] = rewrite(s, tmp_path, f"share-ffn:groups=1,fix={fix}", fit=feeds)
        assert result.fired == 1
        before, after = run(s.model(), feeds[0])["y"], run(model, feeds[0])["y"]
        assert after.dtype == np.float16
        assert drift({"y": before}, {"y": after}) < 0.03


def test_integer_weights_can_be_shared(tmp_path):
    s = transformer(2, 32, 64, activation="gelu")
    copied(s, 0, 1)
    feeds = feeds_of((2, 5, 32), 2)
    model, [first, result] = rewrite(s, tmp_path, "quantize-ffn", "share-ffn:groups=1,fix=none", fit=feeds)
    assert (first.fired, result.fired) == (2, 1)
    assert len(weights(model)) == 1
    assert drift(run(s.model(), feeds[0]), run(model, feeds[0])) < 0.05


def test_blocks_inside_an_if_stay(tmp_path):
    inner = Branch()
    middle = inner.op("Add", "x", inner.ffn("x"))
    s = in_branch(inner, inner.op("Add", middle, inner.ffn(middle)), ["batch", "tokens", D])
    _, [result] = rewrite(s, tmp_path, "share-ffn:groups=1", fit=[{**X, "wanted": np.asarray(True)}])
    assert result.fired == 0
    assert all("subgraph main/" in each.reason for each in result.refused)


def test_a_region_that_reads_another_value_stays(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    size = s.input("size", [], onnx.TensorProto.FLOAT)
    for _ in range(2):
        hidden = s.op("Mul", s.op("Relu", s.linear(x, D, 32)), s.op("Identity", size))
        x = s.op("Add", x, s.linear(hidden, 32, D))
    s.op("Identity", x, out=s.output("y"))
    feed = {**X, "size": np.ones((), np.float32)}
    model, [result] = rewrite(s, tmp_path, "share-ffn:groups=1", fit=[feed])
    assert result.fired == 0
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


@pytest.mark.parametrize(("options", "said"), [("groups=0", "whole number"), ("groups=1.5", "whole number"), ("vary=-1", "fewer"),
                                               ("fix=low", "choose one of affine, scale, none")])
def test_options_that_make_no_sense(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        rewrite(transformer(1), tmp_path, f"share-ffn:{options}")
    with pytest.raises(InputError, match="needs real inputs"):
        rewrite(transformer(2), tmp_path, "share-ffn")
