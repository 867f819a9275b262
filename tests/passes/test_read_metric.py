"""Which errors of a block count how much: by the norm that alone reads the sum behind it, and what slim-ffn makes of that."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.fitting import evidence
from ffnfold.passes.fitting.neuron_fit import NeuronFit
from ffnfold.passes.fitting.read_metric import ReadMetric, read_metric
from ffnfold.passes.slim_ffn import SlimFFN
from ffnfold.search.workshop import Workshop
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((8, 16, D), 20, seed=11)
[X] = feeds_of((4, 9, D))
GAIN = np.array([-2, -1, -0.5, 0.25, 0.5, 1, 2, 3], np.float32)


def post_norm(kind: str = "operator") -> Sketch:
    """LayerNorm(x + ffn(x)) with uneven gains. ``kind``: how the norm is written, or what else reads the sum."""
    s = Sketch()
    x = s.norm(s.input("x", ["batch", "tokens", D]), D)
    branch = s.ffn(x, D, FF, activation="gelu")
    gain, shift = s.weight(GAIN), s.weight(s.numbers(D))
    if kind == "skip":
        s.op("SkipLayerNormalization", x, branch, gain, shift, domain="com.microsoft", epsilon=1e-5, out=s.output("y"))
        return s
    total = s.op("Add", x, branch)
    if kind == "written out":
        centred = s.op("Sub", total, s.op("ReduceMean", total, axes=[-1], keepdims=1))
        variance = s.op("ReduceMean", s.op("Mul", centred, centred), axes=[-1], keepdims=1)
        size = s.op("Sqrt", s.op("Add", variance, s.weight(np.float32(1e-5))))
        s.op("Add", s.op("Mul", s.op("Div", centred, size), gain), shift, out=s.output("y"))
        return s
    normed = s.op("LayerNormalization", total, gain, shift, axis=-1, epsilon=1e-5)
    s.op("Add", normed, total, out=s.output("y")) if kind == "read twice" else s.op("Identity", normed, out=s.output("y"))
    return s


def metric_of(s: Sketch, tmp_path) -> ReadMetric | None:
    return read_metric(next(iter(find_ffn_blocks(Model.load(s.save(tmp_path / "m.onnx"))))))


@pytest.mark.parametrize("kind", ["operator", "skip", "written out"])
def test_channels_count_by_the_gain_of_the_norm_behind(tmp_path, kind):
    metric = metric_of(post_norm(kind), tmp_path)
    assert metric is not None
    squares = GAIN.astype(np.float64) ** 2
    np.testing.assert_allclose(metric.root ** 2, 0.75 * squares / squares.mean() + 0.25, rtol=1e-6)


def test_where_something_else_reads_the_sum_all_count_alike(tmp_path):
    assert metric_of(post_norm("read twice"), tmp_path) is None


def test_where_the_stream_goes_on_all_count_alike(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    total = s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu"))
    s.op("LayerNormalization", total, s.weight(GAIN), s.weight(s.numbers(D)), axis=-1, epsilon=1e-5, out=s.output("y"))
    assert metric_of(s, tmp_path) is None


def test_what_went_in_comes_out():
    metric = ReadMetric(np.linspace(0.5, 2, D))
    rows, offset = np.random.default_rng(0).standard_normal((5, D)), np.arange(D, dtype=np.float64)
    found = metric.out_of(NeuronFit(np.arange(5), metric.into(rows), metric.into(rows[:3]), metric.into(offset), 0.0, 0.0))
    np.testing.assert_allclose(found.matrix, rows)
    np.testing.assert_allclose(found.offset, offset)
    np.testing.assert_allclose(found.affine, rows[:3])


def test_neurons_that_feed_what_is_read_stay(tmp_path, monkeypatch):
    s = Sketch()
    x = s.norm(s.input("x", ["batch", "tokens", D]), D)
    down = s.numbers(FF, D)
    down[:FF // 2, ::2] = 0  # the first half of the neurons feeds what is read, the others the rest
    down[FF // 2:, 1::2] = 0
    hidden = s.op("Relu", s.op("MatMul", x, s.weight(s.numbers(D, FF))))
    branch = s.op("MatMul", hidden, s.weight(down))
    gains = np.where(np.arange(D) % 2, 1, 0.02).astype(np.float32)
    s.op("LayerNormalization", s.op("Add", x, branch), s.weight(gains), s.weight(s.numbers(D)), axis=-1, epsilon=1e-5,
         out=s.output("y"))
    before, lost = run(s.model(), X), {}
    for how in ("as read", "all alike"):
        if how == "all alike":
            monkeypatch.setattr(evidence, "read_metric", lambda block: None)
        model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep={FF // 2},multiple=1,affine=false,refine=0", fit=FIT)
        assert result.fired == 1
        lost[how] = drift(before, run(model, X))
    assert lost["as read"] < 0.9 * lost["all alike"]


def test_all_that_is_fitted_to_goes_through_it(tmp_path):
    """The search's moments, those of the neurons alone, and the rows that V is held near."""
    shop = Workshop(post_norm().save(tmp_path / "m.onnx"), FIT, "cpu", 1)
    [(unit, found)] = shop.evidence([0])
    assert found.metric is not None
    assert found.without_inputs().metric is found.metric
    down = shop.blocks[unit].down.weight().astype(np.float64)
    prior = SlimFFN(affine=False)._features(shop.blocks[unit], found.without_inputs()).prior
    np.testing.assert_allclose(prior, down * found.metric.root)


def test_widths_are_spread_by_what_the_fits_go_by(tmp_path, monkeypatch):
    asked = []
    plain = evidence.Streams.evidence

    def spied(self, block, **options):
        asked.append((options["target"], options["as_read"]))
        return plain(self, block, **options)

    monkeypatch.setattr(evidence.Streams, "evidence", spied)
    rewrite(post_norm(), tmp_path, "slim-ffn:keep=8,multiple=1,affine=false,spread=sensitivity,refine=0", fit=FIT)
    assert asked == [("own", True), ("stream", True)]
