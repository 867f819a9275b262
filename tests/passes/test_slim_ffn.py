"""slim-ffn: which neurons stay, what is fitted, and which blocks it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.kept_fits import Fits
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from rewriting import Branch, feeds_of, in_branch, rewrite

D, FF = 8, 32
FIT = feeds_of((8, 16, D), 10, seed=11)
[X] = feeds_of((4, 9, D))
selections = pytest.mark.parametrize("select", ["wanda", "flap", "magnitude", "qr", "greedy"])


def widths(model: Model) -> list[int]:
    return [block.d_ff for block in find_ffn_blocks(model)]


def with_idle_neurons(idle: list[int], *, gated: bool = False) -> Sketch:
    """A block some of whose neurons do nothing: their row of the down projection is zero, and what they give is small."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    down = s.numbers(FF, D)
    down[idle] = 0
    hidden = s.activation("gelu", s.linear(x, D, FF))
    if gated:
        hidden = s.op("Mul", hidden, s.linear(x, D, FF))
    s.op("Add", x, s.op("Add", s.op("MatMul", hidden, s.weight(down)), s.weight(s.numbers(D))), out=s.output("y"))
    return s


@selections
@pytest.mark.parametrize("gated", [False, True])
def test_neurons_that_do_nothing_go_first(tmp_path, select, gated):
    s = with_idle_neurons(list(range(0, FF, 2)), gated=gated)
    model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep=16,multiple=1,affine=false,select={select}", fit=FIT)
    assert (result.fired, result.refused, widths(model)) == (1, [], [16])
    assert drift(run(s.model(), X), run(model, X)) < 1e-4


@selections
@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"activation": "silu", "gated": True, "bias": False},
                                  {"activation": "relu", "pre_norm": False}])
def test_refitting_is_better_than_cutting(tmp_path, select, kind):
    s = transformer(2, **kind)
    before = run(s.model(), X)
    found = {}
    for refit in ("none", "bias", "ridge"):
        plan = f"slim-ffn:keep=0.5,multiple=1,affine=false,select={select},refit={refit}"
        model, [result] = rewrite(s, tmp_path, plan, fit=FIT)
        assert (result.fired, widths(model)) == (2, [16, 16])
        found[refit] = drift(before, run(model, X))
    assert found["ridge"] < 0.9 * min(found["none"], found["bias"])


def test_an_affine_part_beside_the_neurons_helps(tmp_path):
    s = transformer(2, activation="gelu")
    before = run(s.model(), X)
    errors = []
    for affine in ("false", "true"):
        model, _ = rewrite(s, tmp_path, f"slim-ffn:keep=8,multiple=1,affine={affine}", fit=FIT)
        errors.append(drift(before, run(model, X)))
    assert errors[1] < 0.9 * errors[0]


def test_no_neuron_and_an_affine_part_is_linearize(tmp_path):
    s = transformer(1, activation="gelu")
    slim, [result] = rewrite(s, tmp_path, "slim-ffn:keep=0,affine=true", fit=FIT)
    assert (result.fired, widths(slim)) == (1, [])
    affine, _ = rewrite(s, tmp_path, "linearize-ffn", fit=FIT)
    assert drift(run(affine, X), run(slim, X)) < 1e-4


def test_greedy_sees_that_neurons_stand_in_for_each_other(tmp_path):
    """Every neuron is there twice: half of them can go for nothing, which a score of single neurons cannot know."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, bias, down = s.numbers(D, FF // 2), s.numbers(FF // 2), s.numbers(FF // 2, D)
    hidden = s.op("Add", s.op("MatMul", x, s.weight(np.hstack([up, up]))), s.weight(np.hstack([bias, bias])))
    s.op("Add", x, s.op("MatMul", s.activation("gelu", hidden), s.weight(np.vstack([down, down]))), out=s.output("y"))
    before, errors = run(s.model(), X), {}
    for select in ("greedy", "qr", "wanda"):
        model, _ = rewrite(s, tmp_path, f"slim-ffn:keep=16,multiple=1,affine=false,select={select}", fit=FIT)
        errors[select] = drift(before, run(model, X))
    assert max(errors["greedy"], errors["qr"]) < 1e-3 < errors["wanda"]


def test_a_block_makes_good_what_the_blocks_before_it_did(tmp_path):
    """Block 1 has the neurons of block 0 once more: towards the original stream it does what block 0 can no longer do."""
    s = Sketch()
    x = stream = s.input("x", ["batch", "tokens", D])
    up, bias = s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF))
    for size in (0.1, 0.05):
        hidden = s.activation("gelu", s.op("Add", s.op("MatMul", s.op("Add", x, s.op("Mul", stream, s.number(1e-4))), up), bias))
        stream = s.op("Add", stream, s.op("MatMul", hidden, s.weight(size * s.numbers(FF, D))))
    s.op("Identity", stream, out=s.output("y"))
    before, errors = run(s.model(), X), {}
    for target in ("stream", "block"):
        model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep=14,multiple=1,target={target},affine=false", fit=FIT)
        assert result.fired == 2
        errors[target] = drift(before, run(model, X))
    assert errors["stream"] < 0.9 * errors["block"]


def test_a_norm_that_gives_the_sum_as_well(tmp_path):
    """SkipLayerNormalization hands on the residual stream, too: slimmed, it is what the same model of single nodes is."""
    written = {}
    for fused in (True, False):
        s = Sketch()
        x = s.input("x", ["batch", "tokens", 8])
        gamma = s.weight(np.ones(8, np.float32))
        normed = s.op("LayerNormalization", x, gamma, epsilon=1e-5)
        for number in range(3):
            added = s.ffn(normed, activation="gelu")
            if fused:
                normed = s.op("SkipLayerNormalization", x, added, gamma, domain="com.microsoft", epsilon=1e-5,
                              out=[f"normed_{number}", "", "", f"sum_{number}"])
                x = f"sum_{number}"
            else:
                x = s.op("Add", x, added)
                normed = s.op("LayerNormalization", x, gamma, epsilon=1e-5)
        s.op("Identity", normed, out=s.output("y"))
        model, [result] = rewrite(s, tmp_path, "slim-ffn:keep=0.5,multiple=1,affine=false", fit=feeds_of((4, 8, 8), 10, seed=11))
        assert (result.fired, result.refused) == (3, [])
        written[fused] = run(model, feeds_of((2, 5, 8))[0])
    assert drift(written[False], written[True]) < 1e-4


def test_the_width_is_rounded_up_to_a_multiple(tmp_path):
    model, _ = rewrite(transformer(1), tmp_path, "slim-ffn:keep=0.4,multiple=8", fit=FIT)
    assert widths(model) == [16]


def test_widths_follow_what_reaches_the_output(tmp_path):
    """Block 0 hardly adds anything: its neurons are given to block 1, under the same number of parameters."""
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    for size in (0.01, 1.0):
        hidden = s.activation("gelu", s.linear(s.norm(stream, D), D, FF))
        stream = s.op("Add", stream, s.op("MatMul", hidden, s.weight(size * s.numbers(FF, D))))
    s.op("Identity", stream, out=s.output("y"))
    before, errors = run(s.model(), X), {}
    for spread in ("uniform", "sensitivity"):
        plan = f"slim-ffn:keep=16,multiple=2,affine=false,spread={spread}"
        model, _ = rewrite(s, tmp_path, plan, fit=FIT, choose=FIT[:2])
        errors[spread] = drift(before, run(model, X))
        assert sum(widths(model)) <= 32
    assert widths(model)[0] < 16 < widths(model)[1]
    assert errors["sensitivity"] < 0.8 * errors["uniform"]


def test_magnitude_without_refit_needs_no_feeds(tmp_path):
    model, [result] = rewrite(transformer(2), tmp_path, "slim-ffn:keep=16,multiple=1,affine=false,select=magnitude,refit=none")
    assert (result.fired, widths(model)) == (2, [16, 16])


def test_a_float16_model_stays_one(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(s.norm(x, D), activation="gelu"), out=s.output("y"))
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in FIT]
    model, [result] = rewrite(s, tmp_path, "slim-ffn:keep=24,multiple=1", fit=feeds)
    assert (result.fired, widths(model)) == (1, [24])
    after = run(model, feeds[0])
    assert after["y"].dtype == np.float16
    assert drift(run(s.model(), feeds[0]), after) < 0.05


def test_a_fused_gate_up_is_cut_in_both_halves(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    both = s.op("MatMul", s.norm(x, D), s.weight(s.numbers(D, 2 * FF)))
    gate, up = "gate", "up"
    s.op("Split", both, s.weight(np.asarray([FF, FF])), out=[gate, up], axis=-1)
    s.op("Add", x, s.linear(s.op("Mul", s.activation("silu", gate), up), FF, D), out=s.output("y"))
    before = run(s.model(), X)
    model, [result] = rewrite(s, tmp_path, "slim-ffn:keep=28,multiple=1,affine=false", fit=FIT)
    assert (result.fired, widths(model)) == (1, [28])
    assert drift(before, run(model, X)) < 0.1


def test_padding_is_not_fitted_to(tmp_path):
    s = transformer(1)
    s.input("attention_mask", ["batch", "tokens"], onnx.TensorProto.INT64)
    mask = np.ones((8, 16), np.int64)
    mask[:, 9:] = 0
    found = []
    for size in (0, 100):
        feeds = [{"x": np.where(mask[..., None] != 0, feed["x"], np.float32(size)), "attention_mask": mask} for feed in FIT]
        model, _ = rewrite(s, tmp_path, "slim-ffn:keep=16,multiple=1", fit=feeds)
        found.append(run(model, {**X, "attention_mask": np.ones((4, 9), np.int64)}))
    assert drift(*found) == 0


@pytest.mark.parametrize(("plan", "says"), [
    ("slim-ffn:keep=32", "all of its 32 neurons would stay"),
    ("slim-ffn:keep=0.99,multiple=32", "all of its 32 neurons would stay"),
])
def test_where_nothing_would_get_smaller_it_says_so(tmp_path, plan, says):
    _, [result] = rewrite(transformer(1), tmp_path, f"{plan},affine=false", fit=FIT)
    assert result.fired == 0
    assert says in result.refused[0].reason


def test_a_norm_over_the_neurons_is_left_alone(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.linear(s.norm(s.activation("gelu", s.linear(x, D, FF)), FF), FF, D), out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, "slim-ffn", fit=FIT)
    assert (result.fired, [each.reason for each in result.refused]) == (0, ["its neurons are normed together"])


def test_a_block_inside_a_branch_cannot_be_measured(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.ffn("x")), ["batch", "tokens", D])
    _, [result] = rewrite(s, tmp_path, "slim-ffn:multiple=1", fit=[{**feed, "wanted": np.asarray(True)} for feed in FIT])
    assert result.fired == 0
    assert "subgraph" in result.refused[0].reason


@pytest.mark.parametrize("text", ["keep=0,affine=false", "keep=-1", "keep=1.5", "multiple=0", "affine=true,refit=bias",
                                  "select=best", "spread=sensitivity,select=magnitude,refit=none,affine=false"])
def test_options_that_make_no_sense(tmp_path, text):
    with pytest.raises(InputError):
        rewrite(transformer(1), tmp_path, f"slim-ffn:{text}", fit=FIT)


def test_without_feeds_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs real inputs"):
        rewrite(transformer(1), tmp_path, "slim-ffn")


def test_single_blocks_get_widths_of_their_own(tmp_path):
    plan = "slim-ffn:blocks=0+2-3,widths=8@0/24@3,keep=16,multiple=8"
    model, [result] = rewrite(transformer(4, activation="gelu"), tmp_path, plan, fit=FIT)
    assert (result.fired, widths(model)) == (3, [8, FF, 16, 24])


def test_a_bare_block_gets_no_affine_map(tmp_path):
    """Blocks with and without a map in one pass: each as in a pass of its own after the other."""
    s = transformer(3, activation="gelu")
    one, [result] = rewrite(s, tmp_path, "slim-ffn:widths=8@0/16bare@1/8@2,multiple=8", fit=FIT)
    three, _ = rewrite(s, tmp_path, "slim-ffn:blocks=0,keep=8,multiple=8", "slim-ffn:blocks=1,keep=16,multiple=8,affine=false",
                       "slim-ffn:blocks=2,keep=8,multiple=8", fit=FIT)
    assert (result.fired, widths(one)) == (3, [8, 16, 8])
    assert [node.op for node in one.graph.nodes] == [node.op for node in three.graph.nodes]
    assert drift(run(three, X), run(one, X)) < 1e-5


@pytest.mark.parametrize("pre_norm", [True, False])
def test_no_neurons_leave_the_map_of_linearize_ffn(tmp_path, pre_norm):
    s = transformer(2, activation="gelu", pre_norm=pre_norm)
    slim, [first] = rewrite(s, tmp_path, "slim-ffn:widths=0@0-1", fit=FIT)
    affine, [second] = rewrite(s, tmp_path, "linearize-ffn", fit=FIT)
    assert first.fired == second.fired == 2
    assert [node.op for node in slim.graph.nodes] == [node.op for node in affine.graph.nodes]
    assert drift(run(affine, X), run(slim, X)) < 1e-4


@pytest.mark.parametrize(("options", "reason"), [
    ("widths=8", "write it like"), ("widths=8@x", "write it like"), ("widths=a@0", "write it like"),
    ("widths=8@all", "write it like"), ("widths=0@1,affine=false", "affine=true"), ("widths=bare@0", "write it like"),
    ("widths=0bare@0", "neither neurons nor an affine map"),
    ("widths=8@1,spread=sensitivity", "give one of them"),
    ("widths=8@0/16@0", "block 0 has two widths"), ("widths=8@0-2/16bare@1", "block 1 has two widths"),
    ("widths=8@1,blocks=0", "names block 1, which blocks=0 leaves out"),
    ("widths=8@0+1", "there is no block 1: the model has blocks 0 to 0")])
def test_widths_that_are_none_are_refused(tmp_path, options, reason):
    with pytest.raises(InputError, match=reason):
        rewrite(transformer(1), tmp_path, f"slim-ffn:{options}", fit=FIT)


def test_a_second_pass_fits_towards_the_original_model(tmp_path):
    s = transformer(3, activation="gelu")
    before = run(s.model(), X)
    plans = {"one": ["slim-ffn:keep=8,multiple=8"],
             "two": ["slim-ffn:keep=8,multiple=8,blocks=0", "slim-ffn:keep=8,multiple=8,blocks=1-2"]}
    found = {name: run(rewrite(s, tmp_path, *plan, fit=FIT)[0], X) for name, plan in plans.items()}
    assert drift(found["one"], found["two"]) < 1e-5 < drift(before, found["one"])


def test_fits_that_were_kept_are_used_by_plans_that_begin_alike(tmp_path):
    onnx.save_model(transformer(3, activation="gelu").model(), tmp_path / "before.onnx")
    fits = Fits(tmp_path / "fits")
    several = "8@0/16@1/8@2", "8@0/16@1/24@2", "16@0/16@1/24@2", "16@0/16bare@1/24@2"
    plans = [f"slim-ffn:multiple=8,widths={widths}" for widths in several]
    for plan, there in zip(plans, [3, 4, 7, 9], strict=True):
        models = [Model.load(tmp_path / "before.onnx") for _ in range(2)]
        for model, kept in zip(models, [fits, None], strict=True):
            run_plan(model, Plan.parse([plan]), fit=Feeds.of(FIT), threads=1, fits=kept)
        first, second = (run(model, X) for model in models)
        assert all((first[name] == second[name]).all() for name in first)
        assert len(list((tmp_path / "fits").iterdir())) == there


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_block_with_an_affine_map_beside_it_is_still_a_block_to_later_passes(tmp_path, pre_norm):
    s = transformer(3, activation="gelu", pre_norm=pre_norm)
    model, [slim, rounded, removed] = rewrite(s, tmp_path, "slim-ffn:keep=8,multiple=8,blocks=0-1", "quantize-ffn:blocks=0",
                                              "remove-ffn:keep=nothing,blocks=1-2", fit=FIT)
    assert (slim.fired, rounded.fired, removed.fired, rounded.refused) == (2, 1, 1, [])
    assert [(each.block, "beside its neurons" in each.reason) for each in removed.refused] == [(1, True)]
    assert {each.dtype for each in model.graph.tensors().values() if isinstance(each, gs.Constant)} >= {np.dtype(np.int8)}
    assert widths(model) == [8, 8]
    assert np.isfinite(run(model, X)["y"]).all()


def test_one_expert_in_a_packed_weight(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.activation("gelu", s.op("MatMul", s.norm(x, D), s.weight(s.numbers(D, FF)[None])))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(s.numbers(FF, D)[None])), out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, "slim-ffn:keep=8,multiple=8", fit=FIT)
    assert (result.fired, [each.reason for each in result.refused]) == (0, ["its experts are packed in one weight"])
