"""A whole search: what it writes is what it measured, within the limit, and what was measured is not measured again."""

from __future__ import annotations

import json
import signal
import time
from functools import partial

import ffnfold.passes.optimize as optimize
import ffnfold.search.latency as latency
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from ffn_graphs import Sketch, transformer
from ffnfold.cli import main
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, open_session, parse_limit
from ffnfold.search import SearchJob, search_file
from ffnfold.search.candidates import Candidate, plan_of
from ffnfold.search.run import Search
from ffnfold.search.scoring import weight_bytes
from ffnfold.search.workshop import Workshop
from ffnfold.search.yardstick import Yardstick, next_token_loss
from rewriting import Branch, in_branch


def ended(process) -> dict:
    out, err = process.communicate(timeout=240)
    assert process.returncode in (0, 1), err
    return json.loads(out)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_the_best_plan_is_written_and_optimize_makes_the_same_model(start, model, feeds, tmp_path):
    report = ended(start("a", "--max-drift", "cosine_mean=0.97", "--report", tmp_path / "told"))
    assert report["ok"] is True
    assert "Pareto front" in (tmp_path / "told/report.html").read_text()
    assert json.loads((tmp_path / "told/report.json").read_text())["front"] == report["front"]
    assert report["drift"]["outputs"]["y"]["cosine_mean"] >= 0.97
    assert Plan.load(tmp_path / "a/plan.yaml").entries() == report["plan"]
    front = json.loads((tmp_path / "a/front.json").read_text())["front"]
    assert front == report["front"]
    assert [point["plan"] for point in front if point["chosen"]] == [report["plan"]]
    drifts, speeds = ([point[key] if key == "speedup" else point["drift"]["y"]["cosine_mean"] for point in front]
                      for key in ("drift", "speedup"))
    assert len(front) > 2
    assert speeds == sorted(speeds)
    assert min(drifts) < 0.97 < max(drifts)

    again = CliRunner().invoke(main, ["optimize", str(model), "-o", str(tmp_path / "again.onnx"), "--plan",
                                      str(tmp_path / "a/plan.yaml"), "--data", str(feeds), "--threads", "1", "--no-verify"])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "a/out.onnx").read_bytes()


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_search_that_was_killed_measures_nothing_twice(start, tmp_path):
    records = tmp_path / "cache"

    def measured() -> int:
        return len(list(records.rglob("*.json")))

    kept = []
    for enough in (3, 12, 18):
        process = start("a")
        limit = time.monotonic() + 120
        while measured() < enough and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
        kept.append({file: file.stat().st_mtime_ns for file in records.rglob("*.json")})
        assert len(kept[-1]) >= enough
        assert not list((tmp_path / "a").iterdir())
    report = ended(start("a"))
    for before in kept:
        assert all(file.stat().st_mtime_ns == moment for file, moment in before.items())
    assert report["measured"] == measured() - len(kept[-1])
    assert report["reused"] >= len(kept[-1])

    second = ended(start("b"))
    assert second["measured"] == 0
    assert second["plan"] == report["plan"]
    assert (tmp_path / "b/out.onnx").read_bytes() == (tmp_path / "a/out.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_plans_that_are_known_count_when_no_time_is_left(start, model, feeds, tmp_path, monkeypatch):
    report = ended(start("a"))
    monkeypatch.setattr(Search, "over", True)
    again = search_file(SearchJob(model, tmp_path / "b.onnx", feeds, limits=[parse_limit("cosine_mean=0.97")], threads=1,
                                  cache=tmp_path / "cache", beside=False))
    assert (again["measured"], again["plan"]) == (0, report["plan"])
    assert len(again["points"]) == len(report["points"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_speed_that_cannot_be_had_is_missed(start, tmp_path):
    process = start("a", "--min-speedup", "1000")
    report = ended(process)
    assert process.returncode == 1
    assert any("should be at least 1000" in note for note in report["notes"])
    assert (tmp_path / "a/out.onnx").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_size_is_kept_with_little_drift(start, model, tmp_path):
    size = int(0.75 * model.stat().st_size)
    process = start("a", "--max-bytes", size)
    report = ended(process)
    assert process.returncode == 0, report["notes"]
    assert (tmp_path / "a/out.onnx").stat().st_size <= size
    assert report["drift"]["outputs"]["y"]["cosine_mean"] > 0.95


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_users_own_metric_is_what_is_limited(start, tmp_path):
    (tmp_path / "mine.py").write_text("def largest(ours, theirs, feed):\n    return abs(ours['y'] - theirs['y']).max()\n")
    report = ended(start("a", "--score", "mine:largest", "--max-drift", "score=0.9"))
    [chosen] = [point for point in report["points"] if point["chosen"]]
    assert 0 < chosen["damage"]["score@model"] <= 0.9  # on feeds that choose; on those that report it may be missed, and said
    assert report["ok"] == (0 < report["own"]["score"] <= 0.9)
    assert {name for point in report["points"] for name in point["damage"]} == {"score@model"}


def test_what_would_be_measured_is_said_and_nothing_written(model, feeds, tmp_path):
    job = SearchJob(model, tmp_path / "out.onnx", feeds, limits=[parse_limit("cosine_mean=0.9")], threads=1,
                    cache=tmp_path / "cache")
    found = search_file(job, dry_run=True)
    assert found["ffn_blocks"] == 3
    assert found["block_shapes"] == 1
    assert found["candidates"]["0"][:2] == ["keep", "int8-gptq"]
    measured = [each for several in found["candidates"].values() for each in several if each != "keep" and "+" not in each]
    assert found["measurements"] == {"drift": len(measured), "latency": len(found["candidates"]["0"])
                                     + len(found["candidates"]["attention"]) - 1}
    assert found["minutes"]["alone"] > 0
    assert not (tmp_path / "out.onnx").exists()


def words(**options: str) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]


@pytest.mark.parametrize(("options", "said"), [
    ({}, "give --max-drift, --min-speedup or --max-bytes"),
    ({"max_drift": "rel_l2@z=0.1"}, "no output 'z'"),
    ({"max_drift": "kl_mean=0.1"}, "outputs that are logits"),
    ({"max_drift": "score=0.1"}, "--score"),
    ({"max_drift": "perplexity=1.1"}, "--perplexity"),
    ({"max_drift": "perplexity=1.1", "perplexity": "z"}, "no such output"),
    ({"max_drift": "score=1", "score": "nowhere:at_all"}, "cannot be imported"),
    ({"max_drift": "score=1", "score": "statistics:fmean"}, "the function fails"),
    ({"max_drift": "perplexity=1.1", "perplexity": "y"}, "no input holds token ids"),
    ({"min_speedup": "1.1", "shape": "x=4x8x64*none"}, "write it like"),
    ({"min_speedup": "1.1", "shape": "x=0x8x64"}, "a size is at least 1"),
    ({"min_speedup": "1.1", "shape": "x=4x8x64*0"}, "above 0"),
    ({"min_speedup": "1.1", "workers": "2", "scheduler": "tcp://127.0.0.1:1"}, "give one of them"),
    ({"min_speedup": "1.1", "output": "nowhere/out.onnx"}, "there is no folder"),
    ({"min_speedup": "1.1", "data": "nowhere"}, "no such feed")])
def test_what_makes_no_sense_is_refused_in_one_line(model, feeds, tmp_path, options, said):
    given = {"output": str(tmp_path / "out.onnx"), "data": str(feeds), "cache": str(tmp_path / "cache"), **options}
    result = CliRunner().invoke(main, ["search", str(model), *words(**given)])
    lines = result.stderr.splitlines()
    assert result.exit_code == 2
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out.onnx").exists()


def test_perplexity_is_that_of_the_tokens_that_come_next(tmp_path):
    random = np.random.default_rng(0)
    logits, tokens = random.standard_normal((2, 5, 7)), random.integers(0, 7, (2, 5))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    loss, count = next_token_loss(logits, tokens, {"attention_mask": mask})
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = [-np.log(p[row, place, tokens[row, place + 1]]) for row, last in ((0, 4), (1, 2)) for place in range(last)]
    assert count == len(expected)
    assert loss == pytest.approx(sum(expected))


def test_perplexity_of_an_output_that_is_no_vocabulary_is_refused_first(tmp_path):
    s = Sketch()
    table, tokens = s.weight(np.ones((50, 8), np.float32)), s.input("input_ids", ["n", "t"], onnx.TensorProto.INT64)
    s.op("Gather", table, tokens, out=s.output("hidden", ["n", "t", 8]))
    ids = [np.array([[1, 2, 3]]), np.array([[4, 40, 5]])]
    yardstick = Yardstick(Model.load(s.save(tmp_path / "model.onnx")), Feeds.of([{"input_ids": each} for each in ids]),
                          provider="cpu", threads=1, perplexity="hidden")
    with pytest.raises(InputError, match="--perplexity hidden: it has 8 numbers for a token, and 'input_ids' has the token 40"):
        yardstick.check()


def test_an_output_without_a_row_is_left_out(tmp_path):
    s = Sketch()
    s.op("Relu", s.input("x", ["n", 8]), out=s.output("y", ["n", 8]))
    s.op("Relu", s.input("z", ["m", 8]), out=s.output("none", ["m", 8]))
    feeds = Feeds.of([{"x": np.ones((2, 8), np.float32), "z": np.ones((0, 8), np.float32)}])
    yardstick = Yardstick(Model.load(s.save(tmp_path / "model.onnx")), feeds, provider="cpu", threads=1)
    yardstick.check()
    assert yardstick.outputs == ["y"]


def test_perplexity_of_a_model_against_itself_is_one(tmp_path):
    s = Sketch()
    ids = s.input("input_ids", ["batch", "tokens"], onnx.TensorProto.INT64)
    x = s.op("Gather", s.weight(s.numbers(11, 8)), ids)
    logits = s.output("logits", ["batch", "tokens", 11])
    s.op("MatMul", s.op("Add", x, s.ffn(s.norm(x, 8))), s.weight(s.numbers(8, 11)), out=logits)
    model = Model.load(s.save(tmp_path / "model.onnx"))
    feeds = Feeds.of([{"input_ids": np.random.default_rng(n).integers(0, 11, (2, 6))} for n in range(3)])
    yardstick = Yardstick(model, feeds, provider="cpu", threads=1, perplexity="logits")
    assert yardstick.measure(model.copy())["model"]["perplexity"] == 1.0
    shop = Workshop(tmp_path / "model.onnx", feeds, "cpu", 1)
    removed = next(each for each in shop.candidates()[0] if each.removed)
    changed = shop.rewritten({0: removed}, {})
    assert changed is not None
    assert yardstick.measure(changed)["model"]["perplexity"] not in (1.0, None)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_of_a_pair_the_neurons_that_are_left_change_their_form(tmp_path, pre_norm):
    s = transformer(2, 64, 256, activation="gelu", pre_norm=pre_norm)
    feeds = Feeds.of([{"x": np.random.default_rng(n).standard_normal((2, 80, 64)).astype(np.float32)} for n in range(3)])
    shop = Workshop(s.save(tmp_path / "model.onnx"), feeds, "cpu", 1)
    sizes = {}
    for each in (Candidate(64, bare, form=form) for bare in (False, True) for form in ("", "int8")):
        found = shop.rewritten({0: each}, {0: shop.stand_in(0, each)}, timed=True)
        assert found is not None
        sizes[each.bare, each.form] = weight_bytes(found)
    assert sizes[False, ""] - sizes[False, "int8"] > 2.5 * 2 * 64 * 64
    assert sizes[True, ""] - sizes[True, "int8"] > 2.5 * 2 * 64 * 64
    assert sizes[False, ""] - sizes[True, ""] > 3.5 * 64 * 64


def test_a_block_fitted_for_the_search_is_as_good_as_that_of_its_plan(tmp_path):
    """With and without an affine map, from the same moments; neurons leave for all widths in one go, so others may stay."""
    s = transformer(2, 64, 256, activation="gelu")
    feeds = Feeds.of([{"x": np.random.default_rng(n).standard_normal((2, 80, 64)).astype(np.float32)} for n in range(10)])
    shop = Workshop(s.save(tmp_path / "model.onnx"), feeds, "cpu", 1)
    [(_, evidence)] = shop.evidence([0])
    before = open_session(shop.base, threads=1).run({"x": feeds[0]["x"]})["y"]
    errors = {}
    for each in (Candidate(64), Candidate(128), Candidate(64, bare=True), Candidate(128, bare=True), Candidate(0)):
        alone = shop.rewritten({0: each}, {0: shop.fit(0, each, evidence)})
        assert alone is not None
        planned = Model.load(tmp_path / "model.onnx")
        run_plan(planned, plan_of({0: each}, "cpu"), fit=feeds, threads=1)
        first, second = (np.linalg.norm(open_session(model, threads=1).run({"x": feeds[0]["x"]})["y"] - before)
                         for model in (alone, planned))
        assert first == pytest.approx(second, rel=0.05)
        errors[each] = first
    for width in (64, 128):
        assert errors[Candidate(width)] < 0.95 * errors[Candidate(width, bare=True)]


@pytest.mark.timeout(300)
def test_a_block_that_cannot_be_cut_out_is_timed_in_the_whole_model(tmp_path, monkeypatch):
    then = Branch()
    s = in_branch(then, then.op("Add", "x", then.ffn(then.norm("x", 64), 64, 256), name="/join"), ["batch", "tokens", 64])
    monkeypatch.setattr(latency, "_MOST_ROUNDS", 15)
    monkeypatch.setattr(optimize, "race", partial(optimize.race, seconds=0.1))
    random = np.random.default_rng(0)
    (tmp_path / "feeds").mkdir()
    for number in range(6):
        np.savez(tmp_path / f"feeds/{number}.npz", x=random.standard_normal((4, 32, 64)).astype(np.float32), wanted=True)
    job = SearchJob(s.save(tmp_path / "model.onnx"), tmp_path / "out.onnx", tmp_path / "feeds", threads=1,
                    cache=tmp_path / "cache", limits=[parse_limit("cosine_mean=0.99")])
    report = search_file(job)
    assert report["ok"]
    keys = [json.loads(file.read_text())["key"] for file in (tmp_path / "cache").rglob("*.json")]
    assert any(key.startswith("('whole'") and "'int8-gptq'" in key for key in keys)
    assert not any("slim" in key for key in keys if key.startswith("('alone'"))
