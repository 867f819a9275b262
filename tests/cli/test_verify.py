"""``ffnfold verify``."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from contract import BLOCK_DRIFT, METRICS, VERIFY
from ffn_graphs import Sketch


@pytest.fixture
def quantized(cli, folder, model):
    assert cli("optimize", model, "-o", "quantized.onnx", "-p", "quantize-ffn").code == 0
    return folder / "quantized.onnx"


@pytest.fixture
def classifier(folder):
    """x [n, 8] → logits [n, 10]."""
    s = Sketch()
    s.op("Identity", s.linear(s.input("x", ["n", 8]), 8, 10), out=s.output("logits", ["n", 10]))
    np.savez(folder / "x.npz", x=np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32))
    return s.save(folder / "classifier.onnx")


def test_json_holds_the_keys_of_the_contract(cli, model, quantized, feeds):
    outcome = cli("verify", model, quantized, "--data", feeds, "--json")
    found = outcome.json
    assert outcome.code == 0
    assert list(found) == VERIFY
    assert (found["provider"], found["feeds"], found["samples"], found["ok"]) == ("cpu", "real", 12, True)
    assert list(found["outputs"]) == ["y"]
    assert list(found["outputs"]["y"]) == METRICS
    assert found["outputs"]["y"]["top1"] is None
    assert 0 < found["outputs"]["y"]["rel_l2"] < 0.02


def test_a_model_against_itself_has_not_moved(cli, model, feeds):
    y = cli("verify", model, model, "--data", feeds, "--json").json["outputs"]["y"]
    assert (y["max_abs"], y["rel_l2"], y["nonfinite"]) == (0, 0, 0)
    assert y["cosine_min"] == pytest.approx(1)
    assert y["sqnr_db"] == 200  # the most it says


def test_a_missed_limit_is_exit_code_1_and_named(cli, model, quantized, feeds):
    outcome = cli("verify", model, quantized, "--data", feeds, "--max-drift", "rel_l2=1e-9", "--max-drift", "cosine_mean=0.9",
                  "--json")
    assert outcome.code == 1
    assert outcome.json["ok"] is False
    (line,) = outcome.err.splitlines()
    assert line.startswith("ffnfold: rel_l2 of 'y' is ")
    assert line.endswith("should be at most 1e-09")


def test_the_table_says_what_was_missed(cli, model, quantized, feeds):
    outcome = cli("verify", model, quantized, "--data", feeds, "--max-drift", "max_abs@y=0")
    assert outcome.code == 1
    assert "12 real feeds, cpu" in outcome.out
    assert "max_abs of 'y'" in outcome.err


def test_an_output_called_logits_gets_its_metrics(cli, classifier):
    limits = ("--max-drift", "top1=1", "--max-drift", "kl_mean=1e-9")
    found = cli("verify", classifier, classifier, "--data", "x.npz", *limits, "--json")
    assert found.code == 0
    logits = found.json["outputs"]["logits"]
    assert (logits["top1"], logits["top5"]) == (1, 1)
    assert logits["kl_mean"] == pytest.approx(0, abs=1e-12)


def test_logits_by_another_name(cli, model, quantized, feeds):
    y = cli("verify", model, quantized, "--data", feeds, "--logits", "y", "--json").json["outputs"]["y"]
    assert 0.9 < y["top1"] <= 1
    assert y["kl_mean"] > 0


def test_per_block_adds_one_entry_a_block(cli, model, feeds):
    cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn:blocks=1")
    found = cli("verify", model, "out.onnx", "--data", feeds, "--per-block", "--json").json
    assert list(found) == [*VERIFY, "block_samples", "blocks"]
    assert (found["samples"], found["block_samples"]) == (12, 4)
    blocks = found["blocks"]
    assert [each["block"] for each in blocks] == [0, 1, 2]
    assert all(list(each) == BLOCK_DRIFT for each in blocks)
    assert all(list(each[where]["y"]) == METRICS for each in blocks for where in ("alone", "chain"))
    assert blocks[0]["max_abs"] == 0
    assert blocks[1]["max_abs"] > 0
    assert [each["rank"] for each in blocks] == [2, 1, 3]
    assert blocks[1]["added"]["y"] == blocks[1]["alone"]["y"]["rel_l2"] > 0


def test_the_table_of_blocks_has_the_worst_first(cli, model, feeds):
    cli("optimize", model, "-o", "out.onnx", "-p", "quantize-ffn:blocks=1+2", "-p", "remove-ffn:blocks=2,keep=nothing")
    lines = cli("verify", model, "out.onnx", "--data", feeds, "--per-block").out.splitlines()
    places = [next(number for number, line in enumerate(lines) if f"block {index}" in line) for index in (2, 1, 0)]
    assert places == sorted(places)


def test_numbers_that_overflow_are_called_out(cli, folder):
    for name, kind in (("single", onnx.TensorProto.FLOAT), ("half", onnx.TensorProto.FLOAT16)):
        s = Sketch()
        narrow = s.op("Cast", s.input("x", ["n", 4]), to=kind)
        squared = s.op("Mul", narrow, narrow, name="/attention/square")
        s.op("Cast", s.op("Mul", squared, squared, out=s.output("z", ["n", 4], kind)), to=1, out=s.output("y", ["n", 4]))
        s.save(folder / f"{name}.onnx")
    np.savez(folder / "x.npz", x=np.full((1, 4), 300, np.float32))
    outcome = cli("verify", "single.onnx", "half.onnx", "--data", "x.npz", "--json")
    found = outcome.json["first_nonfinite"]
    assert (found["op"], found["feed"], found["largest_input"], found["reaches_output"]) == ("Mul", 0, 300, True)
    assert found["node"] == "/attention/square"
    assert "Mul node '/attention/square' is the first whose numbers are not finite" in outcome.err


def test_synthetic_feeds_are_labelled(cli, model, quantized):
    found = cli("verify", model, quantized, "--synthetic", "--json").json
    assert found["feeds"] == "synthetic"


def test_one_npz_file_is_one_feed(cli, model, feeds):
    assert cli("verify", model, model, "--data", feeds / "00.npz", "--json").json["samples"] == 1


def test_keys_may_say_in_and_out(cli, folder, model):
    np.savez(folder / "x.npz", **{"in:x": np.ones((1, 2, 8), np.float32), "out:y": np.ones(3)})
    assert cli("verify", model, model, "--data", "x.npz").code == 0


def test_a_candidate_with_other_outputs_is_refused(refused, model, feeds, classifier):
    line = refused("verify", model, classifier, "--data", feeds)
    assert "output 'logits' is in the candidate and not in the reference" in line


def test_a_candidate_that_gives_another_shape_is_refused(refused, folder, model, feeds):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", 8])
    s.op("ReduceSum", x, out=s.output("y", ["batch", "tokens", 8]), keepdims=0)
    s.outputs[0].type.tensor_type.ClearField("shape")
    other = s.save(folder / "other.onnx")
    assert "shape" in refused("verify", model, other, "--data", feeds)


def test_a_candidate_with_other_inputs_is_refused(refused, folder, model, feeds):
    s = Sketch()
    s.op("Relu", s.input("pixels", ["batch", "tokens", 8]), out=s.output("y", ["batch", "tokens", 8]))
    other = s.save(folder / "other.onnx")
    assert "input 'pixels' is in the candidate" in refused("verify", model, other, "--data", feeds)
