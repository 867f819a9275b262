"""``ffnfold bench``."""

from __future__ import annotations

import json

import pytest
from contract import BENCH, RATIO, TIMES
from ffn_graphs import transformer


@pytest.fixture
def wider(folder):
    """Like ``model``, with enough work to be slower than it every time."""
    return transformer(3, d_ff=4096, activation="gelu").save(folder / "wider.onnx")


def test_json_holds_the_keys_of_the_contract(cli, model, wider):
    outcome = cli("bench", wider, model, "--shape", "x=1x64x8", "--threads", "1", "--json")
    found = outcome.json
    assert outcome.code == 0
    assert list(found) == BENCH
    assert found["provider"] == "cpu"
    assert [list(each) for each in found["models"]] == [TIMES, TIMES]
    assert [each["model"] for each in found["models"]] == [str(wider), str(model)]
    assert [set(each) for each in found["ratios"]] == [set(RATIO)]
    assert found["machine"]["threads"] == 1
    for each in found["models"]:
        assert 0 < each["p50_ms"] <= each["p90_ms"] <= each["p99_ms"]
        assert each["nodes_by_provider"]["cpu" if "cpu" in each["nodes_by_provider"] else "CPUExecutionProvider"] > 0
    assert found["models"][0]["bytes"] == wider.stat().st_size


def test_a_model_with_less_work_is_faster(cli, model, wider):
    (ratio,) = cli("bench", wider, model, "--shape", "x=1x64x8", "--threads", "1", "--json").json["ratios"]
    assert ratio["low"] <= ratio["speedup"] <= ratio["high"]
    assert ratio["low"] > 1


def test_the_table_and_real_feeds(cli, model, feeds):
    outcome = cli("bench", "model.onnx", "model.onnx", "--data", feeds)
    assert outcome.code == 0
    assert outcome.out.count("model.onnx") == 2
    assert "CPU " in outcome.out


def test_one_model_alone_has_no_ratio(cli, model):
    assert cli("bench", model, "--shape", "x=1x4x8", "--json").json["ratios"] == []


def test_a_ratio_behind_its_baseline_is_exit_code_1(cli, folder, model):
    earlier = {"ratios": [{"model": str(model), "speedup": 1000.0}]}
    (folder / "earlier.json").write_text(json.dumps(earlier))
    outcome = cli("bench", model, model, "--shape", "x=1x4x8", "--baseline", "earlier.json", "--max-regression", "10", "--json")
    assert outcome.code == 1
    assert "was 1000.000: more than 10 % behind" in outcome.err
    assert outcome.json["ratios"]


def test_a_ratio_within_its_baseline_is_exit_code_0(cli, folder, model):
    (folder / "earlier.json").write_text(json.dumps({"ratios": [{"model": str(model), "speedup": 0.001}]}))
    assert cli("bench", model, model, "--shape", "x=1x4x8", "--baseline", "earlier.json", "--max-regression", "5").code == 0


@pytest.mark.parametrize(("arguments", "said"), [
    (["--shape", "x=1xtwo"], "write it like NAME=1x128"),
    (["--shape", "z=1x4x8"], "'z'"),
    (["--shape", "x=1x4x9"], "x"),
    (["--shape", "x=1x4x8", "--baseline", "earlier.json"], "--max-regression"),
    (["--shape", "x=1x4x8", "--baseline", "earlier.json", "--max-regression", "5"], "no such file"),
    (["--shape", "x=1x4x8", "--baseline", "model.onnx", "--max-regression", "5"], "is no result of"),
    (["--shape", "x=1x4x8", "--cuda-graph"], "--provider cuda"),
    (["--shape", "x=1x4x8", "--threads", "0"], "--threads"),
    (["--shape", "x=1x4x8", "--session-config", "no equals sign"], "write it like"),
    (["--shape", "x=1x4x8", "missing.onnx"], "missing.onnx"),
    (["--shape", "x=1x4x8", "feeds"], "feeds"),
])
def test_bad_input(refused, model, feeds, arguments, said):
    assert said in refused("bench", model, *arguments)


def test_data_and_shape_together_are_refused(refused, model, feeds):
    assert "not both" in refused("bench", model, "--data", feeds, "--shape", "x=1x4x8")


def test_session_configuration_reaches_onnx_runtime(refused, model):
    line = refused("bench", model, "--shape", "x=1x4x8", "--session-config", f"{'k' * 2000}=1")
    assert "session configuration entry 'kkk" in line
