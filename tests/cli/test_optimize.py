"""``ffnfold optimize``."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
import yaml
from contract import METRICS, OPTIMIZE, PASS, RATIO, VERIFY
from feed_files import write_feeds
from ffn_graphs import drift, run, transformer
from ffnfold.passes.plan import Plan, default_plan

FEED = {"x": np.random.default_rng(5).standard_normal((1, 4, 8)).astype(np.float32)}


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_json_holds_the_keys_of_the_contract(cli, model, feeds):
    report = cli("optimize", model, "-o", "out.onnx", "--data", feeds, "--json").json
    assert [key for key in report if key not in ("equivalence", "notes", "machine")] == OPTIMIZE
    assert (report["model"], report["output"]) == (str(model), "out.onnx")
    assert all(list(each) == PASS for each in report["passes"])
    assert list(report["bytes"]) == ["before", "after"]
    assert report["feeds"] == "real"
    assert list(report["drift"]) == VERIFY
    assert list(report["drift"]["outputs"]["y"]) == METRICS
    assert set(report["speed"]) == set(RATIO)
    assert report["ok"] is True


def test_the_default_plan_needs_no_feeds(cli, folder, model):
    outcome = cli("optimize", model, "-o", "out.onnx", "--json")
    report = outcome.json
    assert (outcome.code, outcome.err) == (0, "")
    assert (report["feeds"], report["drift"], report["speed"]) == (None, None, None)
    assert report["plan"][-1] == "quantize-ffn"
    assert report["passes"][-1]["fired"] == 3
    assert drift(run(model, FEED), run(folder / "out.onnx", FEED)) < 0.02


def test_what_the_exact_passes_did_is_proved(cli, folder, model, feeds):
    report = cli("optimize", model, "-o", "out.onnx", "-p", "clean-up", "-p", "fold-norm", "--data", feeds, "--json",
                 "--report", "told").json
    proof = report["equivalence"]
    assert list(proof) == ["passes", "nodes", "executed", "operators", "differences"]
    assert proof["passes"] == ["clean-up", "fold-norm"]
    assert proof["nodes"]["before"] == len(onnx.load(model).graph.node)
    assert proof["nodes"]["after"] == len(onnx.load(folder / "out.onnx").graph.node)
    assert 0 < proof["executed"]["after"] <= proof["executed"]["before"]
    assert list(proof["differences"]) == ["given", "zeros", "one-hot", "large", "extreme", "denormal"]
    assert all(each < 1e-5 for each in proof["differences"].values())
    page = (folder / "told" / "report.md").read_text()
    assert "| one-hot |" in page
    assert "| executed by ONNX Runtime |" in page


def test_the_proof_is_about_the_exact_passes_alone(cli, model, feeds):
    proof = cli("optimize", model, "-o", "out.onnx", "-p", "fold-norm", "-p", "remove-ffn:keep=nothing", "--data", feeds,
                "--json").json["equivalence"]
    assert proof["passes"] == ["fold-norm"]
    assert proof["differences"]["given"] < 1e-5
    assert cli("optimize", model, "-o", "out.onnx", "-p", "remove-ffn:keep=nothing", "--json").json["equivalence"] is None


def test_without_inputs_the_proof_is_the_number_of_nodes(cli, model):
    proof = cli("optimize", model, "-o", "out.onnx", "-p", "clean-up", "--json").json["equivalence"]
    assert (proof["executed"], proof["differences"]) == (None, {})
    assert proof["nodes"]["after"] <= proof["nodes"]["before"]


def test_an_output_that_an_exact_pass_moved_is_said(cli, model, feeds, monkeypatch):
    from ffnfold.passes.remove_ffn import RemoveFFN

    monkeypatch.setattr(RemoveFFN, "exact", True)  # it is not
    outcome = cli("optimize", model, "-o", "out.onnx", "-p", "remove-ffn:keep=nothing", "--data", feeds)
    assert "the exact passes changed an output on given inputs" in " ".join(outcome.out.split())


def test_the_default_plan_for_cuda_quantizes_weights_only(cli, model):
    report = cli("optimize", model, "-o", "out.onnx", "--target", "cuda", "--json").json
    assert report["plan"][-1] == {"quantize-ffn": {"form": "weight-only"}}


def test_passes_run_in_the_order_given_with_their_options(cli, model, feeds):
    report = cli("optimize", model, "-o", "out.onnx", "-p", "remove-ffn:blocks=1,keep=nothing", "-p", "quantize-ffn:blocks=0-1",
                 "--json").json
    assert report["plan"] == [{"remove-ffn": {"blocks": "1", "keep": "nothing"}}, {"quantize-ffn": {"blocks": "0-1"}}]
    remove, quantize = report["passes"]
    assert (remove["fired"], remove["refused"]) == (1, [])
    assert quantize["fired"] == 1
    assert quantize["refused"] == [{"block": 1, "reason": "removed by remove-ffn earlier in the plan"}]


def test_a_plan_file_does_what_the_same_passes_do(cli, folder, model):
    (folder / "plan.yaml").write_text("- remove-ffn:\n    blocks: [2]\n    keep: nothing\n- fold-bias\n")
    from_file = cli("optimize", model, "-o", "a.onnx", "--plan", "plan.yaml", "--json").json
    given = cli("optimize", model, "-o", "b.onnx", "-p", "remove-ffn:blocks=2,keep=nothing", "-p", "fold-bias", "--json").json
    assert from_file["plan"] == given["plan"]
    assert sha256(folder / "a.onnx") == sha256(folder / "b.onnx")


def test_the_same_run_twice_gives_the_same_bytes(cli, folder, model, feeds):
    for name in ("a.onnx", "b.onnx"):
        assert cli("optimize", model, "-o", name, "-p", "linearize-ffn:blocks=1", "-p", "quantize-ffn", "--data", feeds,
                   "--no-verify", "--threads", "1").code == 0
    assert sha256(folder / "a.onnx") == sha256(folder / "b.onnx")


def test_the_input_is_not_touched(cli, model, feeds):
    before, written = sha256(model), model.stat().st_mtime_ns
    cli("optimize", model, "-o", "out.onnx", "-p", "linearize-ffn", "--data", feeds)
    assert (sha256(model), model.stat().st_mtime_ns) == (before, written)


def test_where_nothing_fires_the_file_is_copied_byte_for_byte(cli, folder, model):
    outcome = cli("optimize", model, "-o", "out.onnx", "-p", "fuse-matmul")
    assert outcome.code == 0
    assert "nothing to do" in outcome.out
    assert (folder / "out.onnx").read_bytes() == model.read_bytes()


def test_a_model_without_blocks_is_copied(cli, folder):
    path = transformer(0).save(folder / "empty.onnx")
    outcome = cli("optimize", path, "-o", "out.onnx", "-p", "quantize-ffn", "--json")
    assert outcome.code == 0
    assert any("nothing to do" in note for note in outcome.json["notes"])
    assert (folder / "out.onnx").read_bytes() == path.read_bytes()


def test_the_output_may_be_the_input(cli, model):
    before = run(model, FEED)
    size = model.stat().st_size
    report = cli("optimize", model, "-o", model, "-p", "remove-ffn:blocks=0,keep=nothing", "--json").json
    assert report["bytes"] == {"before": size, "after": model.stat().st_size}
    assert model.stat().st_size < size
    assert drift(before, run(model, FEED)) > 0.01


def test_an_output_that_is_there_is_replaced(cli, folder, model):
    (folder / "out.onnx").write_text("something else")
    assert cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn").code == 0
    onnx.checker.check_model(onnx.load(folder / "out.onnx"))


def test_a_missed_limit_is_exit_code_1_and_the_file_is_written(cli, folder, model, feeds):
    outcome = cli("optimize", model, "-o", "out.onnx", "-p", "remove-ffn:keep=nothing", "--data", feeds, "--max-drift",
                  "cosine_mean=0.999", "--json")
    assert outcome.code == 1
    assert outcome.json["ok"] is False
    assert outcome.json["drift"]["ok"] is False
    assert any(note.startswith("a limit was missed: cosine_mean of 'y' is ") for note in outcome.json["notes"])
    assert (folder / "out.onnx").exists()


def test_a_missed_limit_with_strict_writes_nothing(cli, folder, model, feeds):
    before = sorted(folder.iterdir())
    outcome = cli("optimize", model, "-o", "out.onnx", "-p", "remove-ffn:keep=nothing", "--data", feeds, "--max-drift",
                  "rel_l2@y=0.001", "--strict")
    assert outcome.code == 1
    assert sorted(folder.iterdir()) == before
    assert "was not written" in outcome.out.replace("\n", " ")


def test_strict_leaves_an_output_that_is_there(cli, folder, model, feeds):
    (folder / "out.onnx").write_text("the good one")
    assert cli("optimize", model, "-o", "out.onnx", "-p", "remove-ffn:keep=nothing", "--data", feeds, "--max-drift",
               "rel_l2=0.001", "--strict").code == 1
    assert (folder / "out.onnx").read_text() == "the good one"


def test_a_kept_limit_with_strict_writes(cli, folder, model, feeds):
    assert cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn", "--data", feeds, "--max-drift", "cosine_mean=0.99",
               "--strict").code == 0
    assert (folder / "out.onnx").exists()


def test_no_verify_measures_nothing(cli, model, feeds):
    report = cli("optimize", model, "-o", "out.onnx", "-p", "linearize-ffn", "--data", feeds, "--no-verify", "--json").json
    assert (report["drift"], report["speed"]) == (None, None)
    assert report["passes"][0]["fired"] == 3


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_fitted_to_synthetic_feeds_is_labelled(cli, model, verify):
    more = [] if verify else ["--no-verify"]
    outcome = cli("optimize", model, "-o", "out.onnx", "-p", "linearize-ffn", "--synthetic", "--json", *more)
    assert outcome.json["passes"][0]["fired"] > 0
    assert outcome.json["feeds"] == "synthetic"
    assert any("fitted to synthetic feeds" in note for note in outcome.json["notes"])


def test_synthetic_feeds_are_labelled(cli, model):
    outcome = cli("optimize", model, "-o", "out.onnx", "--synthetic", "--json")
    assert outcome.json["feeds"] == "synthetic"
    assert outcome.json["drift"]["feeds"] == "synthetic"
    assert any("synthetic" in note for note in outcome.json["notes"])


def test_a_divided_folder_is_reported_on_its_report_part(cli, model, folder):
    for part, count in (("fit", 5), ("choose", 2), ("report", 3)):
        write_feeds(folder / "divided" / part, count)
    report = cli("optimize", model, "-o", "out.onnx", "-p", "linearize-ffn", "--data", "divided", "--json").json
    assert report["drift"]["samples"] == 3


def test_report_writes_its_files(cli, folder, model, feeds):
    outcome = cli("optimize", model, "-o", "out.onnx", "--data", feeds, "--report", "made/report", "--json")
    place = folder / "made" / "report"
    assert {path.name for path in place.iterdir()} == {"report.html", "report.json", "report.md", "plan.yaml", "details.json"}
    assert json.loads((place / "report.json").read_text()) == outcome.json
    assert yaml.safe_load((place / "plan.yaml").read_text()) == outcome.json["plan"]
    page = (place / "report.md").read_text()
    assert "| size |" in page
    assert "- quantize-ffn" in page


def test_a_report_says_what_each_pass_contributed(cli, folder, model, feeds):
    report = cli("optimize", model, "-o", "out.onnx", "-p", "fold-bias", "-p", "remove-ffn:blocks=1,keep=nothing", "-p",
                 "quantize-ffn:row_scale=false", "--data", feeds, "--report", "report", "--json").json
    fired = [each["name"] for each in report["passes"] if each["fired"]]
    rows = report["contributions"]
    assert [row["name"] for row in rows] == fired
    assert fired[-2:] == ["remove-ffn", "quantize-ffn"]
    removed, quantized = rows[-2:]
    assert removed["bytes"] < report["bytes"]["before"]
    assert quantized["bytes"] == pytest.approx(report["bytes"]["after"], rel=0.2), "the file also says how it was made"
    assert all(quantized["gained"][key] > 0 for key in ("speedup", "low", "high"))
    for output, metrics in report["drift"]["outputs"].items():
        assert sum(row["added"][output] for row in rows) == pytest.approx(quantized["drift"][output]["rel_l2"], rel=1e-6)
        assert removed["added"][output] > 0.01, "a whole block is gone"
        assert metrics["rel_l2"] > 0
    page = (folder / "report" / "report.md").read_text()
    assert page.count("| remove-ffn | ") == 1
    assert "What each pass contributed" in (folder / "report" / "report.html").read_text()


def test_the_plan_of_a_report_can_be_run_again(cli, folder, model):
    cli("optimize", model, "-o", "a.onnx", "-p", "remove-ffn:blocks=0+2,keep=nothing", "-p", "quantize-ffn:row_scale=false",
        "--report", "report")
    cli("optimize", model, "-o", "b.onnx", "--plan", "report/plan.yaml")
    assert sha256(folder / "a.onnx") == sha256(folder / "b.onnx")


def test_the_output_says_how_it_was_made(cli, folder, model):
    cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn:blocks=1")
    kept = {entry.key: entry.value for entry in onnx.load(folder / "out.onnx").metadata_props}
    assert yaml.safe_load(kept["ffnfold.plan"]) == [{"quantize-ffn": {"blocks": "1"}}]
    assert "ffnfold.version" in kept
    assert any(sha256(model) in value for value in kept.values())


def test_external_data_stays_external(cli, folder):
    path = transformer(2, 64, 256).save(folder / "model.onnx", save_as_external_data=True, location="model.data")
    feed = {"x": np.random.default_rng(0).standard_normal((1, 2, 64)).astype(np.float32)}
    (folder / "out").mkdir()
    assert cli("optimize", path, "-o", "out/small.onnx", "-p", "quantize-ffn").code == 0
    assert len(list((folder / "out").iterdir())) == 2
    assert drift(run(path, feed), run(folder / "out" / "small.onnx", feed)) < 0.05


@pytest.mark.parametrize("text", ["cosine_mean=0.9", "cosine_mean@y=0.9", "rel_l2=0.5", "max_abs=10", "nonfinite=0",
                                  "sqnr_db=10", "cosine_p5=0.5", "cosine_min=0.5", "mean_abs=1"])
def test_every_metric_can_be_limited(cli, model, feeds, text):
    assert cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn", "--data", feeds, "--max-drift", text).code == 0


def test_a_limit_without_a_plan_is_searched_for(cli, model, feeds, folder):
    limit = ("--max-drift", "cosine_mean=0.9", "--cache", folder / "cache")
    outcome = cli("optimize", model, "-o", "out.onnx", "--data", feeds, *limit, "--threads", "1", "--json")
    assert outcome.code == 0
    assert outcome.json["drift"]["outputs"]["y"]["cosine_mean"] >= 0.9
    assert any("a search of 2 minutes" in note for note in outcome.json["notes"])
    assert Plan.from_entries(outcome.json["plan"]).entries() == outcome.json["plan"]


def test_a_limit_for_a_target_that_is_not_here_takes_the_default_plan(cli, model, feeds):
    limit = ("--max-drift", "cosine_mean=0.9", "--target", "cuda")
    outcome = cli("optimize", model, "-o", "out.onnx", "--data", feeds, *limit, "--json")
    assert outcome.json["plan"] == default_plan("cuda").entries()
