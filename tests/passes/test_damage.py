"""What a rewrite does to the outputs: no finite numbers, nothing to compare, blocks that the feeds never run."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.passes.fitting.damage import output_damage, per_error
from layer_graphs import layers
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 8, 32
FIT = feeds_of((4, 8, D), 10, seed=11)
CHOOSE = feeds_of((4, 8, D), 3, seed=12)
NOT_FINITE = [{"x": np.full((4, 8, D), np.nan, np.float32)}]
measuring = pytest.mark.parametrize("plan", [
    "remove-ffn:keep=ladder,within=100", "remove-ffn:keep=nothing,within=100", "remove-ffn:keep=nothing,count=1,by=output",
    "slim-ffn:multiple=1,refine=0,spread=sensitivity", "factorize-ffn:spread=sensitivity",
    "linearize-ffn:fit=neuron,coverage=0.9"])


@pytest.mark.parametrize(("metrics", "expected"), [
    ({"kl_mean": 0.5, "rel_l2": 9.0}, 0.5), ({"kl_mean": None, "rel_l2": 0.1}, 0.01),
    ({"kl_mean": math.nan, "rel_l2": 0.1}, math.inf),
    ({"kl_mean": None, "rel_l2": math.inf}, math.inf), ({"kl_mean": None, "rel_l2": 1e200}, math.inf)])
def test_what_is_no_finite_number_is_infinite_damage(metrics, expected):
    assert output_damage({"y": metrics}) == pytest.approx(expected)
    assert output_damage({"y": metrics, "z": {"kl_mean": None, "rel_l2": 0.0}}) == pytest.approx(expected / 2)


def test_nothing_compared_is_infinite_damage():
    assert output_damage({}) == math.inf


def test_infinite_damage_can_be_shared_out():
    assert math.isfinite(per_error(math.inf, 0.0))
    assert per_error(math.inf, 1.0) > per_error(1e9, 1.0)


def under_a_root() -> Sketch:
    """Without what block 0 adds the square root of a negative number is taken; block 1 adds next to nothing."""
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    for number, (size, level) in enumerate(((0.1, 30), (1e-3, 0))):
        hidden = s.op("Relu", s.op("MatMul", s.norm(stream, D), s.weight(s.numbers(D, FF)), name=f"/layer.{number}/up"))
        added = s.op("MatMul", hidden, s.weight(size * s.numbers(FF, D)), name=f"/layer.{number}/down")
        stream = s.op("Add", stream, s.op("Add", added, s.weight(np.full(D, level, np.float32))))
    s.op("Sqrt", stream, out=s.output("y"))
    return s


def test_outputs_that_are_no_numbers_any_more_are_beyond_every_limit(tmp_path):
    model, [result] = rewrite(under_a_root(), tmp_path, "remove-ffn:keep=ladder", fit=FIT, choose=CHOOSE)
    assert [note.split(",")[0] for note in result.notes] == ["block 0: mean", "block 1: nothing"]
    assert "(nothing inf)" in result.notes[0]
    assert drift(run(under_a_root().model(), CHOOSE[0]), run(model, CHOOSE[0])) < 0.1
    _, [result] = rewrite(under_a_root(), tmp_path, "remove-ffn:keep=nothing,within=1e9,blocks=0", fit=FIT, choose=CHOOSE)
    assert (result.fired, len(result.refused)) == (0, 1)


def test_a_block_whose_loss_ruins_the_outputs_goes_last(tmp_path):
    model, [result] = rewrite(under_a_root(), tmp_path, "remove-ffn:keep=nothing,count=1,by=output", fit=FIT, choose=CHOOSE)
    assert (result.fired, [block.name for block in find_ffn_blocks(model)]) == (1, ["/layer.0"])


@measuring
def test_a_model_that_gives_no_numbers_cannot_be_compared(tmp_path, plan):
    s = transformer(2, activation="gelu")
    _, [result] = rewrite(s, tmp_path, plan, fit=FIT, choose=NOT_FINITE)
    assert result.fired == 0
    assert [each.block for each in result.refused] == [0, 1]
    assert "not finite on the feeds that choose" in result.refused[0].reason


@measuring
def test_padding_alone_is_nothing_to_compare(tmp_path, plan):
    s = transformer(2, activation="gelu")
    s.input("attention_mask", ["batch", "tokens"], onnx.TensorProto.INT64)
    fit, choose = ([{**feed, "attention_mask": np.full((4, 8), there)} for feed in FIT] for there in (1, 0))
    _, [result] = rewrite(s, tmp_path, plan, fit=fit, choose=choose)
    assert result.fired == 0
    assert "nothing in them to compare" in result.refused[0].reason


def test_layers_are_not_chosen_by_outputs_that_are_no_numbers(tmp_path):
    _, [result] = rewrite(layers("pre"), tmp_path, "remove-layer:count=1,by=output", fit=FIT, choose=NOT_FINITE)
    assert (result.fired, len(result.refused)) == (0, 2)
    assert "not finite" in result.refused[0].reason


@pytest.mark.parametrize("plan", ["remove-ffn:keep=nothing,count", "remove-layer:count", "remove-attention:keep=nothing,count"])
def test_without_a_score_none_is_chosen_by_chance(tmp_path, plan):
    s = layers("pre", 3)
    _, [result] = rewrite(s, tmp_path, f"{plan}=2", fit=FIT, choose=NOT_FINITE)
    assert result.fired == 0
    assert len(result.refused) == 2
    assert all("by=cosine gives it no score on the feeds that choose" in each.reason for each in result.refused)
    _, [result] = rewrite(s, tmp_path, f"{plan}=3", fit=FIT, choose=NOT_FINITE)
    assert result.fired == 3


def test_only_what_has_a_score_is_chosen(tmp_path):
    model, [result] = rewrite(under_a_root(), tmp_path, "remove-ffn:keep=nothing,count=1,blocks=0-1,by=output", fit=FIT)
    assert (result.fired, [block.name for block in find_ffn_blocks(model)]) == (1, ["/layer.0"])
    s = layers("pre", 3)
    down = next(node for node in s.nodes if node.name == "/layer.2/ffn/down/MatMul").input[1]
    s.weight(np.full((32, D), np.inf, np.float32), down)
    _, [result] = rewrite(s, tmp_path, "remove-ffn:keep=nothing,count=2,blocks=1-2+0", fit=FIT)
    assert (result.fired, result.refused) == (2, [])


def behind_an_if() -> Sketch:
    """A block in the branch of an If that is taken where ``wanted``, and one behind it."""
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x", name="/inside")), ["batch", "tokens", D])
    s.outputs.clear()
    s.op("Add", "y", s.ffn("y", name="/behind"), out=s.output("z"))
    return s


def wanting(wanted: bool) -> list[dict[str, np.ndarray]]:
    return [{**feed, "wanted": np.asarray(wanted)} for feed in FIT]


@pytest.mark.parametrize("keep", ["ladder", "nothing"])
def test_a_branch_that_is_never_taken_stays(tmp_path, keep):
    for taken, fired in ((True, 2), (False, 1)):
        model, [result] = rewrite(behind_an_if(), tmp_path, f"remove-ffn:keep={keep},within=100", fit=wanting(taken))
        assert (result.fired, len(find_ffn_blocks(model))) == (fired, 2 - fired)
    assert [each.reason for each in result.refused] == ["no token of the feeds that choose reached it"]
    feed = wanting(True)[0]
    only, _ = rewrite(behind_an_if(), tmp_path, "remove-ffn:keep=nothing,blocks=1")
    assert drift(run(only, feed), run(model, feed)) < 1e-6


def test_by_output_a_branch_that_is_never_taken_is_not_the_one_that_matters_least(tmp_path):
    model, [result] = rewrite(behind_an_if(), tmp_path, "remove-ffn:keep=nothing,count=1,by=output", fit=wanting(False))
    assert (result.fired, [block.name for block in find_ffn_blocks(model)]) == (1, ["/inside"])


@pytest.mark.parametrize("by", ["cosine", "output"])
def test_what_cannot_be_measured_is_not_chosen(tmp_path, by):
    model, [result] = rewrite(behind_an_if(), tmp_path, f"remove-ffn:keep=mean,count=1,by={by}", fit=wanting(True))
    assert (result.fired, [block.name for block in find_ffn_blocks(model)]) == (1, ["/inside"])
    assert "subgraph" in result.refused[0].reason


def experts() -> Sketch:
    """Two experts, each for the tokens whose first feature has its sign."""
    s = Sketch()
    x = s.input("x", ["tokens", D])
    first = s.op("Gather", x, s.weight(np.asarray(0)), axis=1)
    total = x
    for number, sign in enumerate(("Greater", "Less")):
        index = s.op("Transpose", s.op("NonZero", s.op(sign, first, s.number(0))))
        rows = s.op("GatherND", x, index)
        total = s.op("ScatterND", total, index, s.op("Add", rows, s.ffn(rows, name=f"/expert.{number}")))
    s.op("Identity", total, out=s.output("y"))
    return s


@pytest.mark.parametrize("plan", ["remove-ffn:keep=ladder,within=1e6", "remove-ffn:keep=mean,within=1e6"])
def test_an_expert_that_no_token_reached_stays(tmp_path, plan):
    fit = feeds_of((40, D), 4, seed=11)
    choose = [{"x": np.abs(feed["x"])} for feed in fit]
    model, [result] = rewrite(experts(), tmp_path, plan, fit=fit, choose=choose)
    assert (result.fired, [block.name for block in find_ffn_blocks(model)]) == (1, ["/expert.1"])
    assert [(each.block, each.reason) for each in result.refused] == [(1, "no token of the feeds that choose reached it")]


def test_a_block_that_adds_nothing_to_tokens_that_reach_it_may_go(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.op("Relu", s.op("MatMul", x, s.weight(-np.abs(s.numbers(D, FF)))))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(s.numbers(FF, D))), out=s.output("y"))
    positive = [{"x": np.abs(feed["x"])} for feed in FIT]
    _, [result] = rewrite(s, tmp_path, "remove-ffn:keep=ladder,within=0", fit=positive)
    assert (result.fired, result.notes) == (1, ("block 0: nothing, which moves the outputs by 0",))
