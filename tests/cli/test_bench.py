"""``ffnfold bench``."""

from __future__ import annotations

import csv
import json

import ffnfold
import pytest
from contract import BENCH, RATIO, TIMES
from ffn_graphs import transformer


@pytest.fixture
def wider(folder):
    """Like ``model``, with enough work to be slower than it every time."""
    return transformer(3, d_ff=4096, activation="gelu").save(folder / "wider.onnx")


def test_json_holds_the_keys_of_the_contract(cli, model, wider):
    outcome = cli("bench", wider, model, "--shape", "x=1x64x8", "--threads", "1", "--seconds", "1", "--json")
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
    assert all(each["fallback_nodes"] == [] for each in found["models"])  # the CPU was asked for
    assert found["models"][0]["bytes"] == wider.stat().st_size


def test_a_model_with_less_work_is_faster(cli, model, wider):
    (ratio,) = cli("bench", wider, model, "--shape", "x=1x64x8", "--threads", "1", "--json").json["ratios"]
    assert ratio["low"] <= ratio["speedup"] <= ratio["high"]
    assert ratio["low"] > 1


def test_the_table_and_real_feeds(cli, model, feeds):
    outcome = cli("bench", "model.onnx", "model.onnx", "--data", feeds, "--seconds", "0")
    assert outcome.code == 0
    assert outcome.out.count("model.onnx") == 2
    assert "CPU " in outcome.out
    assert "compute on the CPU" not in outcome.out


def test_one_model_alone_has_no_ratio(cli, model):
    assert cli("bench", model, "--shape", "x=1x4x8", "--seconds", "0", "--json").json["ratios"] == []


def test_a_ratio_behind_its_baseline_is_exit_code_1(cli, folder, model):
    earlier = {"ratios": [{"model": str(model), "speedup": 1000.0}]}
    (folder / "earlier.json").write_text(json.dumps(earlier))
    outcome = cli("bench", model, model, "--shape", "x=1x4x8", "--seconds", "0", "--baseline", "earlier.json",
                  "--max-regression", "10", "--json")
    assert outcome.code == 1
    assert "was 1000.000: more than 10 % behind" in outcome.err
    assert outcome.json["ratios"]


def test_a_ratio_within_its_baseline_is_exit_code_0(cli, folder, model):
    (folder / "earlier.json").write_text(json.dumps({"ratios": [{"model": str(model), "speedup": 0.001}]}))
    assert cli("bench", model, model, "--shape", "x=1x4x8", "--seconds", "0", "--baseline", "earlier.json",
               "--max-regression", "5").code == 0


def test_a_grid_has_an_entry_for_each_shape_and_number_of_threads(cli, model, wider):
    grid = ["--shape", "x=1,2x4,8x8", "--threads", "1", "--threads", "2"]
    found = cli("bench", wider, model, *grid, "--seconds", "0", "--json").json
    assert list(found) == BENCH
    shapes = [[batch, tokens, 8] for batch in (1, 2) for tokens in (4, 8)]
    assert [(each["threads"], each["shape"]["x"]) for each in found["ratios"]] == [(n, shape) for n in (1, 2) for shape in shapes]
    assert [each["model"] for each in found["models"]] == [str(wider), str(model)] * 8
    assert all(list(each) == [*TIMES, "shape", "threads"] for each in found["models"])
    assert found["machine"]["threads"] == [1, 2]


def test_the_table_of_a_grid_says_the_shape(cli, model):
    out = cli("bench", model, model, "--shape", "x=1x4,16x8", "--seconds", "0").out
    assert "x 1x4x8" in out
    assert "x 1x16x8" in out


def test_csv_has_a_row_for_each_model_at_each_shape(cli, folder, model, wider):
    outcome = cli("bench", wider, model, "--shape", "x=1x4,16x8", "--seconds", "0", "--csv", "table.csv", "--json")
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["shape"]) for row in rows] == [
        (str(path), f"x=1x{tokens}x8") for tokens in (4, 16) for path in (wider, model)]
    found = outcome.json
    for row, each in zip(rows, found["models"], strict=True):
        assert float(row["p50_ms"]) == each["p50_ms"]
    assert [row["low"] for row in rows] == ["", str(found["ratios"][0]["low"]), "", str(found["ratios"][1]["low"])]
    assert rows[0]["cpu"] == found["machine"]["cpu"]


def test_roofline_counts_the_work_and_measures_the_machine(cli, model, wider):
    found = cli("bench", wider, model, "--shape", "x=1x64x8", "--seconds", "0", "--roofline", "--json").json
    for each, d_ff in zip(found["models"], (4096, 32), strict=True):
        assert list(each) == [*TIMES, "roofline"]
        roofline = each["roofline"]
        assert roofline["operations"] == 3 * 2 * 2 * 64 * 8 * d_ff
        assert roofline["bound_ms"] > 0
        assert roofline["reached"] == pytest.approx(roofline["bound_ms"] / each["p50_ms"])
        assert roofline["matmul_gops"]["float32"] > 0
    assert "GOP" in cli("bench", model, "--shape", "x=1x64x8", "--seconds", "0", "--roofline").out


def test_the_machine_and_its_versions_are_recorded(cli, model):
    machine = cli("bench", model, "--shape", "x=1x4x8", "--seconds", "0", "--json").json["machine"]
    assert machine["ffnfold"] == ffnfold.__version__
    assert {"cpu", "cores", "memory_bytes", "os", "python", "onnxruntime", "onnx", "numpy", "gpu", "feeds"} <= set(machine)


def test_a_result_is_a_baseline_for_the_same_grid(cli, folder, model, wider):
    grid = ["--shape", "x=1x4,16x8", "--seconds", "0"]
    (folder / "earlier.json").write_text(cli("bench", wider, model, *grid, "--json").out)
    limit = ["--baseline", "earlier.json", "--max-regression", "95%"]
    assert cli("bench", wider, model, *grid, *limit).code == 0
    other = cli("bench", wider, model, "--shape", "x=1x8x8", "--seconds", "0", *limit)
    assert other.code == 1
    assert "has no speed-up to compare with" in other.err


LIMIT = ["--baseline", "earlier.json", "--max-regression", "5%"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["other.onnx", "--shape", "x=1x4x8", *LIMIT], "has no speed-up of 'other.onnx'"),
    (["--shape", "x=1x4x8", *LIMIT], "give two models"),
    (["--shape", "x=1x4x8", "--baseline", "earlier.json", "--max-regression", "five"], "write it like 5%"),
    (["--shape", "x=1x4x8", "--baseline", "earlier.json", "--max-regression", "-1"], "write it like 5%"),
    (["--shape", "x=1x4x8", "--csv", "feeds"], "the table cannot be written there, as it is a folder"),
    (["--shape", "x=1x4x8", "--csv", "nowhere/table.csv"], "the table cannot be written"),
    (["--shape", "x=0x4x8"], "a size is at least 1"),
    (["--shape", "x=1,x8"], "NAME=1,8x16,128 for a grid"),
    (["--shape", "x=1x4x8", "--shape", "x=1x5x8", "--threads", "1", "--threads", "0"], "--threads"),
])
def test_what_cannot_be_compared_or_written_is_said_first(refused, folder, model, feeds, arguments, said):
    (folder / "earlier.json").write_text(json.dumps({"ratios": [{"model": "some/model.onnx", "speedup": 1.0}]}))
    assert said in refused("bench", model, *arguments)


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
