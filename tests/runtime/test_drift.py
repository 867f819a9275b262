"""Drift: every metric against its formula, padding, limits, and what cannot be compared."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.runtime import Feeds, compare, metrics, open_session, parse_limit
from ffnfold.runtime.metrics import OutputMetrics
from onnx import TensorProto, helper
from scipy.special import log_softmax


def measured(reference, candidate, logits=False):
    found = OutputMetrics(logits)
    found.update(np.asarray(reference), np.asarray(candidate))
    return found.result()


@pytest.fixture
def pair(random):
    reference = random.standard_normal((4, 50, 30)).astype(np.float32)
    return reference, reference + 0.1 * random.standard_normal((4, 50, 30)).astype(np.float32)


@pytest.mark.parametrize("tile", [1 << 20, 100])
def test_every_metric_is_its_formula(pair, monkeypatch, tile):
    monkeypatch.setattr(metrics, "_TILE", tile)
    r, c = (array.astype(np.float64).reshape(-1, 30) for array in pair)
    d = c - r
    cosines = (r * c).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(c, axis=1)
    p, q = log_softmax(r, axis=1), log_softmax(c, axis=1)
    best = r.argmax(1)
    five = np.argsort(-c, axis=1)[:, :5]
    expected = {
        "max_abs": np.abs(d).max(), "mean_abs": np.abs(d).mean(), "rel_l2": np.linalg.norm(d) / np.linalg.norm(r),
        "sqnr_db": 10 * np.log10((r ** 2).sum() / (d ** 2).sum()), "cosine_mean": cosines.mean(),
        "cosine_p5": np.percentile(cosines, 5), "cosine_min": cosines.min(), "kl_mean": (np.exp(p) * (p - q)).sum(1).mean(),
        "top1": (c.argmax(1) == best).mean(), "top5": (five == best[:, None]).any(1).mean(), "nonfinite": 0}
    found = measured(*pair, logits=True)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_metrics_over_feeds_are_those_of_all_rows(pair):
    whole, parts = OutputMetrics(True), OutputMetrics(True)
    whole.update(*pair)
    for one, other in zip(*pair, strict=True):
        parts.update(one, other)
    for name, value in whole.result().items():
        assert parts.result()[name] == pytest.approx(value, rel=1e-9), name


def test_equal_outputs_have_no_drift_at_all(pair):
    found = measured(pair[0], pair[0], logits=True)
    assert found == {"max_abs": 0, "mean_abs": 0, "rel_l2": 0, "sqnr_db": 200, "cosine_mean": 1, "cosine_p5": 1, "cosine_min": 1,
                     "kl_mean": 0, "top1": 1, "top5": 1, "nonfinite": 0}


def test_zero_rows_are_equal_to_zero_rows_only():
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert measured(zero, zero)["cosine_min"] == 1
    assert measured(one, zero)["cosine_min"] == 0 == measured(zero, one)["cosine_min"]
    assert measured(zero, one)["rel_l2"] == math.inf
    assert measured(zero, one)["sqnr_db"] == -200


def test_a_small_distance_is_not_rounded_away():
    r, c = np.array([[1.0, 0.0]]), np.array([[1.0, 1e-5]])
    assert 1 - measured(r, c)["cosine_min"] == pytest.approx(5e-11, rel=1e-3)


def test_equal_infinities_are_equal_and_others_are_counted():
    inf, nan = math.inf, math.nan
    same = measured([[1.0, -inf, nan]], [[1.0, -inf, nan]])
    assert (same["max_abs"], same["cosine_min"], same["nonfinite"]) == (0, 1, 0)
    masked = measured([[1.0, 2.0, -inf]], [[1.0, 2.5, -inf]], logits=True)
    assert masked["max_abs"] == 0.5
    assert math.isfinite(masked["kl_mean"])
    broken = measured([[1.0, 2.0], [1.0, 1.0]], [[nan, inf], [1.0, 1.0]], logits=True)
    assert broken["nonfinite"] == 2
    assert all(math.isnan(broken[name]) for name in ("max_abs", "rel_l2", "sqnr_db", "cosine_mean", "cosine_p5", "cosine_min"))
    assert (broken["top1"], math.isnan(broken["kl_mean"])) == (0.5, True)
    assert measured([[inf]], [[1.0]])["nonfinite"] == 0
    assert measured([[1.0, 1.0]], [[1.0, inf]])["max_abs"] == inf


def test_a_candidate_that_says_nothing_agrees_with_nothing():
    r = np.eye(8)[[7, 6, 5]]
    assert measured(r, np.zeros_like(r), logits=True)["top5"] == 0


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.float16])
def test_other_types_are_compared_as_numbers(dtype):
    found = measured(np.array([[0, 1], [1, 1]], dtype), np.array([[0, 1], [0, 1]], dtype))
    assert (found["max_abs"], found["mean_abs"]) == (1, 0.25)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_scalars_and_vectors_are_one_row(shape):
    found = measured(np.ones(shape), np.ones(shape), logits=True)
    assert (found["max_abs"], found["cosine_mean"], found["top1"]) == (0, 1, 1)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 3, 4)])
def test_outputs_without_a_row_have_no_numbers(shape):
    assert set(measured(np.ones(shape), np.ones(shape), logits=True).values()) == {None}


def test_nothing_to_compare_is_no_perfect_match(workshop, one_line):
    path = workshop.linear(np.ones((2, 2), np.float32))
    drift = compare(path, path, Feeds.of([{"x": np.ones((0, 3, 2), np.float32)}]), limits=[parse_limit("cosine_mean=0.9")])
    assert not drift
    assert drift.missed == ("cosine_mean of 'y' is not known, as it has no row to compare, should be at least 0.9",)
    with pytest.raises(InputError) as caught:
        drift.check_rows()
    one_line(caught.value, "no row to compare: every row of the feeds is padding or empty: give feeds with tokens")


def test_an_output_without_a_row_beside_one_with_rows(workshop):
    kinds = {"x": (TensorProto.FLOAT, ["n", 2]), "z": (TensorProto.FLOAT, ["m", 2])}
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["z"], ["none"])]
    path = workshop.save(nodes, kinds, {"y": kinds["x"], "none": kinds["z"]})
    feeds = Feeds.of([{"x": np.ones((1, 2), np.float32), "z": np.ones((0, 2), np.float32)}])
    drift = compare(path, path, feeds)
    drift.check_rows()
    assert drift.outputs["y"]["cosine_mean"] == 1
    assert set(drift.to_json()["outputs"]["none"].values()) == {None}
    assert compare(path, path, feeds, limits=[parse_limit("rel_l2@y=0")])
    assert not compare(path, path, feeds, limits=[parse_limit("rel_l2@none=0")])


@pytest.fixture
def models(workshop, random):
    """Two models x → relu(x W), the second with W a little different; and two feeds."""
    weight = random.standard_normal((16, 8), np.float32)
    paths = [workshop.linear(weight, "a.onnx"), workshop.linear(weight + np.float32(0.05), "b.onnx")]
    feeds = Feeds.of([{"x": random.standard_normal((2, 3, 16), np.float32)} for _ in range(2)])
    return *paths, feeds


def test_two_models_are_compared_on_every_feed(models):
    reference, candidate, feeds = models
    seen = []
    drift = compare(reference, Model.load(candidate), feeds, progress=lambda done, total: seen.append((done, total)))
    outputs = [[open_session(path).run(feed)["y"] for feed in feeds] for path in (reference, candidate)]
    assert drift.outputs["y"]["max_abs"] == pytest.approx(np.abs(np.subtract(*outputs)).max(), rel=1e-5)
    assert seen == [(1, 2), (2, 2)]
    assert drift
    result = json.loads(json.dumps(drift.to_json(), allow_nan=False))
    assert list(result) == ["provider", "feeds", "samples", "ok", "outputs"]
    assert (result["provider"], result["feeds"], result["samples"], result["ok"]) == ("cpu", "real", 2, True)
    assert list(result["outputs"]["y"]) == ["max_abs", "mean_abs", "rel_l2", "sqnr_db", "cosine_mean", "cosine_p5",
                                           "cosine_min", "kl_mean", "top1", "top5", "nonfinite"]


def test_open_sessions_and_values_inside_can_be_compared(models):
    reference, candidate, feeds = models
    drift = compare(*(open_session(path, outputs=["hidden"]) for path in (reference, candidate)), feeds, outputs=["hidden"])
    assert list(drift.outputs) == ["hidden"]
    assert compare(reference, candidate, feeds, outputs=["hidden"]).to_json() == drift.to_json()


def test_drift_is_free_of_what_json_lacks(workshop):
    nan = workshop.save([helper.make_node("Log", ["x"], ["y"])], {"x": (TensorProto.FLOAT, [2])}, {"y": (TensorProto.FLOAT, [2])})
    same = workshop.identity(TensorProto.FLOAT, [2])
    drift = compare(same, nan, Feeds.of([{"x": np.array([-1, 1], np.float32)}]), limits=[parse_limit("rel_l2=1")])
    text = json.dumps(drift.to_json(), allow_nan=False)
    assert json.loads(text)["outputs"]["y"]["max_abs"] is None
    assert (drift.outputs["y"]["nonfinite"], bool(drift)) == (1, False)


def test_rows_that_are_padding_do_not_count(workshop):
    def model(name, factor):
        return workshop.save([helper.make_node("Mul", ["x", "by"], ["y"])],
                             {"x": (TensorProto.FLOAT, ["b", "t", 2]), "attention_mask": (TensorProto.INT64, ["b", "t"])},
                             {"y": (TensorProto.FLOAT, None)}, {"by": np.array(factor, np.float32).reshape(1, 3, 1)}, name)

    x = np.ones((1, 3, 2), np.float32)
    same_but_last = [model("a.onnx", [1, 1, 1]), model("b.onnx", [1, 1, 9])]
    for mask, expected in (([[1, 1, 0]], 0), ([[1, 1, 1]], 8)):
        drift = compare(*same_but_last, Feeds.of([{"x": x, "attention_mask": np.array(mask)}]))
        assert drift.outputs["y"]["max_abs"] == expected


def test_limits_hold_or_are_missed_in_words(models):
    reference, candidate, feeds = models
    value = compare(reference, candidate, feeds).outputs["y"]["cosine_mean"]
    assert compare(reference, candidate, feeds, limits=[parse_limit(f"cosine_mean={value - 1e-6}"), parse_limit("max_abs@y=9")])
    missed = compare(reference, candidate, feeds, limits=[parse_limit(f"cosine_mean={value + 1e-6}"), parse_limit("max_abs@y=0")])
    assert not missed
    assert missed.to_json()["ok"] is False
    assert [sentence.split()[0] for sentence in missed.missed] == ["cosine_mean", "max_abs"]


def test_lower_limits_and_upper_limits():
    for metric in ("cosine_mean", "cosine_p5", "cosine_min", "sqnr_db", "top1", "top5"):
        limit = parse_limit(f"{metric}=0.5")
        assert (limit.met(0.6), limit.met(0.5), limit.met(0.4), limit.met(math.nan), limit.met(None)) == (
            True, True, False, False, False)
    for metric in ("max_abs", "mean_abs", "rel_l2", "kl_mean", "nonfinite"):
        limit = parse_limit(f"{metric}=0.5")
        assert (limit.met(0.6), limit.met(0.5), limit.met(0.4), limit.met(math.nan), limit.met(math.inf)) == (
            False, True, True, False, False)


def test_a_limit_may_name_any_output():
    limit = parse_limit("max_abs@a=b@c=1e-3")
    assert (limit.metric, limit.output, limit.value) == ("max_abs", "a=b@c", 1e-3)


def test_logits_get_their_metrics(workshop, random):
    weight = random.standard_normal((16, 8), np.float32)
    feeds = Feeds.of([{"x": random.standard_normal((1, 3, 16), np.float32)}])
    named = [workshop.linear(weight * k, f"{k}.onnx", output="logits") for k in (1, 2)]
    other = [workshop.linear(weight * k, f"{k}o.onnx", output="scores") for k in (1, 2)]
    assert compare(*named, feeds).outputs["logits"]["top1"] == 1
    assert compare(*other, feeds).outputs["scores"]["top1"] is None
    assert compare(*other, feeds, logits=["scores"], limits=[parse_limit("top1=1")])


def test_limits_without_a_name_are_for_floating_outputs(workshop):
    def model(name, op, step):
        return workshop.save([helper.make_node("Identity", ["x"], ["y"]), helper.make_node(op, ["n", "step"], ["k"])],
                             {"x": (TensorProto.FLOAT, [2]), "n": (TensorProto.INT64, [2])},
                             {"y": (TensorProto.FLOAT, [2]), "k": (TensorProto.INT64, [2])}, {"step": np.array(step)}, name)

    pair = model("a.onnx", "Add", 1), model("b.onnx", "Sub", 1)
    feeds = Feeds.of([{"x": np.ones(2, np.float32), "n": np.ones(2, np.int64)}])
    drift = compare(*pair, feeds, limits=[parse_limit("max_abs=0")])
    assert (bool(drift), drift.outputs["k"]["max_abs"]) == (True, 2)
    assert not compare(*pair, feeds, limits=[parse_limit("max_abs@k=0")])


def test_strings_and_sequences_are_left_out_and_said(workshop):
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["s"], ["words"])]
    path = workshop.save(nodes, {"x": (TensorProto.FLOAT, [1]), "s": (TensorProto.STRING, [1])},
                         {"y": (TensorProto.FLOAT, [1]), "words": (TensorProto.STRING, [1])})
    drift = compare(path, path, Feeds.of([{"x": np.ones(1, np.float32), "s": np.array(["a"])}]))
    assert (list(drift.outputs), list(drift.skipped)) == (["y"], ["words"])


def test_limits_that_make_no_sense_are_said_in_one_line(models, one_line):
    reference, candidate, feeds = models
    for text, words in (("speed=1", ["speed", "cosine_mean"]), ("rel_l2", ["cosine_mean@OUTPUT=0.99"]), ("rel_l2=x", ["x"]),
                        ("rel_l2=nan", ["nan"]), ("rel_l2@=1", ["rel_l2"])):
        with pytest.raises(InputError) as caught:
            parse_limit(text)
        one_line(caught.value, *words)
    for limit, words in (("rel_l2@z=1", ["z", "y"]), ("top1=1", ["--logits"]), ("kl_mean@y=1", ["--logits"])):
        with pytest.raises(InputError) as caught:
            compare(reference, candidate, feeds, limits=[parse_limit(limit)])
        one_line(caught.value, *words)
    with pytest.raises(InputError) as caught:
        compare(reference, candidate, feeds, logits=["z"])
    one_line(caught.value, "z", "y")


def test_models_that_differ_outwardly_are_not_compared(workshop, models, one_line):
    reference, _, feeds = models
    weight = np.ones((16, 9), np.float32)
    others = ((workshop.linear(weight, "wide.onnx"), ["y", "8", "9"]),
              (workshop.linear(weight, "name.onnx", "z"), ["y", "candidate"]),
              (workshop.save([helper.make_node("Neg", ["other"], ["y"])], {"other": (TensorProto.FLOAT, ["a", "b", 16])},
                             {"y": (TensorProto.FLOAT, None)}, name="input.onnx"), ["input 'other'"]))
    for other, words in others:
        with pytest.raises(InputError) as caught:
            compare(reference, other, feeds)
        one_line(caught.value, *words)
    with pytest.raises(InputError, match="no feeds"):
        compare(reference, reference, feeds[:0])
