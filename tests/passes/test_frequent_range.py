"""linearize-ffn:fit=neuron with coverage: a line where a neuron is most of the time, and how the parts are spread."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.base import Context
from ffnfold.passes.fitting.frequent_range import LEVELS, Curves, spread_coverage
from ffnfold.passes.fitting.neuron_lines import choose_coverage
from ffnfold.runtime import Feeds
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((4, 8, D), 10, seed=11)
[X] = feeds_of((2, 5, D))


def curves_of(z: np.ndarray, h: np.ndarray, weights: np.ndarray | None = None) -> Curves:
    weights = np.ones(len(z)) if weights is None else weights
    curves = Curves()
    for part in np.array_split(np.arange(len(z)), 3):
        curves.update(z[part].astype(np.float32), h[part].astype(np.float32), weights[part])
    return curves


def test_on_everything_it_is_the_least_squares_line():
    random = np.random.default_rng(0)
    z, weights = random.standard_normal((5000, 3)) * [1, 5, 0.1] + [0, 3, -2], random.uniform(0.1, 2, 5000)
    h = np.maximum(z, 0) + 0.1 * random.standard_normal(z.shape)
    lines = curves_of(z, h, weights).lines(1.0)
    for neuron in range(3):
        slope, intercept = np.polyfit(z[:, neuron], h[:, neuron], 1, w=np.sqrt(weights))
        left = np.average((h[:, neuron] - slope * z[:, neuron] - intercept) ** 2, weights=weights)
        np.testing.assert_allclose([lines.slope[neuron], lines.intercept[neuron], lines.error[neuron]], [slope, intercept, left],
                                   rtol=1e-4, atol=1e-5)


def test_the_range_leaves_out_where_the_activation_bends():
    random = np.random.default_rng(0)
    z = np.concatenate([random.uniform(1, 3, 800), random.uniform(-9, -8, 200)])[:, None]
    curves = curves_of(z, np.maximum(z, 0))
    inside, everywhere = curves.lines(0.75), curves.lines(1.0)
    np.testing.assert_allclose([inside.slope[0], inside.intercept[0]], [1, 0], atol=1e-3)
    assert inside.error[0] < 1e-6 < everywhere.error[0]
    assert abs(everywhere.slope[0] - 1) > 0.5


def test_a_neuron_that_stands_still():
    lines = curves_of(np.full((10, 1), 2.0), np.full((10, 1), 1.5)).lines(0.8)
    assert (lines.slope[0], lines.intercept[0], lines.error[0]) == (0, 1.5, 0)


def test_errors_grow_with_what_is_covered():
    z = np.random.default_rng(0).standard_normal((4000, 4)) * [0.1, 1, 3, 10]
    errors = curves_of(z, np.maximum(z, 0)).errors()
    assert errors.shape == (4, len(LEVELS))
    assert (np.diff(errors, axis=1) >= 0).all()
    assert (errors[:, -1] > errors[:, 0]).all()


@pytest.mark.parametrize("coverage", [0.5, 0.6, 0.83, 1])
def test_the_mean_part_is_the_one_asked_for(coverage):
    random = np.random.default_rng(0)
    errors = [np.cumsum(random.uniform(0, 1, (width, len(LEVELS))), axis=1) for width in (30, 50)]
    parts = spread_coverage(errors, coverage)
    assert [len(part) for part in parts] == [30, 50]
    assert abs(np.concatenate(parts).mean() - coverage) < 1e-3


def test_what_is_cheap_to_cover_is_covered_first():
    rising = np.arange(len(LEVELS)) ** 2
    parts = spread_coverage([np.stack([rising, 100 * rising]), np.stack([0 * rising])], 0.8)
    assert parts[1][0] == 1
    assert parts[0][0] > parts[0][1]


def test_no_other_parts_have_a_smaller_error():
    """Against all of them, for three neurons on a coarse grid of levels."""
    errors = np.asarray([[0, 1, 3, 7, 15], [0, 2, 4, 6, 9], [0, 0, 1, 5, 9]], float)
    wide = np.stack([np.interp(np.arange(len(LEVELS)) / 2.5, np.arange(5), row) for row in errors])
    parts = spread_coverage([wide], 0.75)[0]
    chosen = np.round((parts - LEVELS[0]) / (LEVELS[1] - LEVELS[0])).astype(int)
    best = min(sum(wide[i, level] for i, level in enumerate(levels)) for levels in np.ndindex(*[len(LEVELS)] * 3)
               if sum(levels) == 15)
    assert chosen.sum() == 15
    assert sum(wide[i, level] for i, level in enumerate(chosen)) == pytest.approx(best)


def open_but_for_some() -> tuple[Sketch, list]:
    """A block of ReLUs that are open on most tokens, and shut on one in eight, which are far away."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = np.abs(s.numbers(D, FF)) + 0.1
    hidden = s.op("Relu", s.op("MatMul", x, s.weight(up)))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(s.numbers(FF, D))), out=s.output("y"))
    feeds = [{"x": np.abs(feed["x"])} for feed in FIT]
    for feed in feeds:
        feed["x"][:, 0] -= 6
    return s, feeds


@pytest.mark.parametrize("spread", ["uniform", "sensitivity"])
def test_tokens_inside_are_kept_and_those_outside_get_the_line_too(tmp_path, spread):
    s, feeds = open_but_for_some()
    before = run(s.model(), feeds[0])["y"]
    moved = {}
    for coverage in (0.8, 1):
        plan = f"linearize-ffn:fit=neuron,weight=none,coverage={coverage},spread={spread}"
        model, [result] = rewrite(s, tmp_path, plan, fit=feeds)
        assert result.fired == 1
        after = run(model, feeds[0])["y"]
        moved[coverage] = drift({"y": before[:, 1:]}, {"y": after[:, 1:]}), drift({"y": before[:, :1]}, {"y": after[:, :1]})
    assert moved[0.8][0] < 1e-3 < moved[1][0]
    assert moved[0.8][1] > moved[1][1]


def half_read() -> Sketch:
    """Both blocks the same but for their weights; the head hardly reads what block 0 writes."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    for number, features in enumerate((slice(4, 8), slice(0, 4))):
        up, down = s.numbers(D, FF), np.zeros((FF, D), np.float32)
        up[4:] = 0
        down[:, features] = s.numbers(FF, 4)
        hidden = s.op("Relu", s.op("MatMul", x, s.weight(up), name=f"/layer.{number}/up"))
        x = s.op("Add", x, s.op("MatMul", hidden, s.weight(down), name=f"/layer.{number}/down"))
    head = s.numbers(D, 3)
    head[4:] *= 0.01
    s.op("MatMul", x, s.weight(head), out=s.output("y"))
    return s


def test_blocks_that_do_not_reach_the_outputs_are_covered_more(tmp_path):
    onnx.save_model(half_read().model(), tmp_path / "before.onnx")
    model = Model.load(tmp_path / "before.onnx")
    blocks = {block.index: block for block in find_ffn_blocks(model)}
    parts = list(choose_coverage(model, blocks, 0.8, "none", Context(Feeds.of(FIT), Feeds.of(FIT), threads=1)).values())
    assert parts[0].mean() > parts[1].mean() + 0.1
    assert abs(np.concatenate(parts).mean() - 0.8) < 1e-3


def test_the_same_feeds_give_the_same_bytes(tmp_path):
    written = []
    for _ in range(2):
        rewrite(transformer(2), tmp_path, "linearize-ffn:fit=neuron,coverage=0.9", fit=FIT)
        written.append((tmp_path / "after.onnx").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(("options", "said"), [("fit=neuron,coverage=0.2", "must be from 0.5 to 1"),
                                               ("fit=neuron,coverage=1.5", "must be from 0.5 to 1"),
                                               ("coverage=0.9", "goes with fit=neuron")])
def test_options_that_make_no_sense(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        rewrite(transformer(1), tmp_path, f"linearize-ffn:{options}", fit=FIT)
