"""Where results go is looked at before the work: exit code 2, one line, nothing written, no input overwritten."""

from __future__ import annotations

import os
import sys

import pytest
from ffn_graphs import transformer

linux = pytest.mark.skipif(sys.platform != "linux", reason="FIFOs and /proc")
LONG = "n" * 300 + ".onnx"
PLACES = [("nowhere/out.onnx", "there is no folder 'nowhere'"), ("feeds", "it is a folder"),
          ("model.onnx/out.onnx", "there is no folder"), ("fifo", "it is no regular file"), (LONG, "File name too long"),
          ("/proc/out.onnx", "no file can be made there"), ("stdout", "it is no regular file"),
          ("feeds/00.npz", "it is an input")]


@pytest.fixture
def places(folder, feeds):
    """A FIFO, and a link such as /dev/stdout."""
    os.mkfifo(folder / "fifo")
    (folder / "stdout").symlink_to("/proc/self/fd/1")


@linux
@pytest.mark.parametrize(("place", "said"), PLACES)
def test_outputs_that_cannot_be_written(refused_and_unchanged, places, model, feeds, place, said):
    assert said in refused_and_unchanged("optimize", model, "-o", place, "-p", "quantize-ffn", "--data", feeds)
    assert said in refused_and_unchanged("search", model, "-o", place, "--data", feeds, "--max-drift", "rel_l2=1")
    assert said in refused_and_unchanged("bench", model, "--data", feeds, "--csv", place)


@linux
@pytest.mark.parametrize("name", ["plan.yaml", "front.json"])
def test_what_a_search_writes_beside_its_model_is_looked_at_first(refused_and_unchanged, folder, model, feeds, name):
    os.mkfifo(folder / name)
    line = refused_and_unchanged("search", model, "-o", "out.onnx", "--data", feeds, "--max-drift", "rel_l2=1")
    assert f"{name}: the result cannot be written there, as it is no regular file" in line


BASELINE = ["--baseline", "report.json", "--max-regression", "5"]


@pytest.mark.parametrize("arguments", [
    ["bench", "model.onnx", "--csv", "model.onnx"],
    ["bench", "model.onnx", "--report", "."],
    ["bench", "model.onnx", "model.onnx", *BASELINE, "--csv", "report.json"],
    ["bench", "model.onnx", "model.onnx", *BASELINE, "--report", "."],
    ["bench", "model.onnx", "--data", "feeds/00.npz", "--csv", "feeds/00.npz"],
    ["bench", "model.onnx", "--data", "feeds", "--csv", "feeds/03.npz"],
    ["verify", "model.onnx", "model.onnx", "--synthetic", "--report", "."],
    ["search", "model.onnx", "-o", "out.onnx", "--data", "feeds", "--max-drift", "rel_l2=1", "--report", "."],
    ["optimize", "model.onnx", "-o", "plan.yaml", "--plan", "plan.yaml"],
    ["optimize", "model.onnx", "-o", "out.onnx", "--plan", "plan.yaml", "--report", "."],
])
def test_inputs_are_not_overwritten(refused_and_unchanged, folder, model, feeds, arguments):
    (folder / "plan.yaml").write_text("- fold-bias\n")
    (folder / "report.json").write_text("{}")
    (folder / "report.html").symlink_to("model.onnx")
    assert "it is an input" in refused_and_unchanged(*arguments)


def test_the_weights_of_the_input_are_not_overwritten(refused_and_unchanged, folder):
    model = transformer(1, 16, 64).save(folder / "outside.onnx", save_as_external_data=True, location="outside.data")
    assert f"holds weights of {model}" in refused_and_unchanged("optimize", model, "-o", "outside.data")


def test_a_table_may_lie_among_the_feeds(cli, folder, model, feeds):
    for _ in ("new", "there"):
        assert cli("bench", model, "--data", feeds, "--seconds", "0", "--csv", feeds / "table.csv").code == 0


@linux
@pytest.mark.parametrize(("place", "said"), [
    ("model.onnx", "'model.onnx' is no folder"),
    ("model.onnx/report", "model.onnx' is no folder"),
    ("html", "html/report.html: the report cannot be written there, as it is a folder"),
    ("json", "json/report.json: the report cannot be written there, as it is no regular file"),
    ("n" * 300, "File name too long"),
    ("fifo", "'fifo' is no folder"),
    ("/proc/report", "no file can be made there"),
])
def test_a_report_that_cannot_be_written_is_found_before_the_work(refused_and_unchanged, folder, model, places, place, said):
    (folder / "html" / "report.html").mkdir(parents=True)
    (folder / "json").mkdir()
    os.mkfifo(folder / "json" / "report.json")
    assert said in refused_and_unchanged("optimize", model, "-o", "out.onnx", "--no-verify", "--report", place)
    assert said in refused_and_unchanged("bench", model, "--shape", "x=1x4x8", "--report", place)


@pytest.mark.parametrize("arguments", [
    ["inspect", LONG],
    ["optimize", "model.onnx", "-o", "out.onnx", "--data", LONG],
    ["optimize", "model.onnx", "-o", "out.onnx", "--plan", LONG],
    ["optimize", "model.onnx", "-o", "out.onnx", "-p", "linearize-ffn", "--synthetic", "--cache", LONG],
    ["verify", "model.onnx", LONG, "--synthetic"],
    ["verify", "model.onnx", "model.onnx", "--data", LONG],
    ["bench", "model.onnx", LONG, "--shape", "x=1x4x8"],
    ["bench", "model.onnx", "--data", LONG],
    ["bench", "model.onnx", "model.onnx", "--baseline", LONG, "--max-regression", "5"],
    ["models", "get", "minilm", "-o", LONG],
])
def test_names_that_are_too_long(refused_and_unchanged, model, arguments):
    assert LONG in refused_and_unchanged(*arguments)
