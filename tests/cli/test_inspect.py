"""``ffnfold inspect``."""

from __future__ import annotations

import json

import pytest
from contract import BLOCK, INSPECT
from ffn_graphs import Sketch, transformer


@pytest.fixture
def attention_only(folder):
    """A MatMul on a residual stream: no FFN."""
    s = Sketch()
    x = s.input("x", ["n", 8])
    s.op("Add", x, s.linear(x, 8, 8), out=s.output("y", ["n", 8]))
    return s.save(folder / "plain.onnx")


def test_json_holds_the_keys_of_the_contract(cli, model):
    found = cli("inspect", model, "--json").json
    assert list(found) == INSPECT
    assert found["model"] == str(model)
    assert found["opset"] == 17
    for block in found["ffn_blocks"]:
        assert list(block) == list(BLOCK)
        assert all(isinstance(block[key], kind) for key, kind in BLOCK.items())


def test_numbers_of_a_block_that_can_be_counted_by_hand(cli, model):
    found = cli("inspect", model, "--json").json
    first = found["ffn_blocks"][0]
    assert [block["index"] for block in found["ffn_blocks"]] == [0, 1, 2]
    assert {key: first[key] for key in ("d_model", "d_ff", "d_out", "activation", "gated", "up_bias", "down_bias", "graph")} == {
        "d_model": 8, "d_ff": 32, "d_out": 8, "activation": "gelu", "gated": False, "up_bias": True, "down_bias": True,
        "graph": "main"}
    assert first["parameters"] == 8 * 32 + 32 + 32 * 8 + 8
    assert first["macs_per_token"] == 8 * 32 + 32 * 8
    assert first["experts"] == 1
    assert first["shares_weights_with"] is None


def test_a_gated_block_without_biases(cli, folder):
    path = transformer(1, activation="silu", gated=True, bias=False).save(folder / "gated.onnx")
    (block,) = cli("inspect", path, "--json").json["ffn_blocks"]
    assert (block["activation"], block["gated"], block["up_bias"], block["down_bias"]) == ("silu", True, False, False)
    assert block["parameters"] == 3 * 8 * 32


def test_a_model_without_blocks_is_no_error(cli, attention_only):
    assert cli("inspect", attention_only, "--json").json["ffn_blocks"] == []
    outcome = cli("inspect", attention_only)
    assert outcome.code == 0
    assert "no FFN block found" in outcome.out


def test_the_table_shows_every_block(cli, model):
    outcome = cli("inspect", model)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.count("8→32") == 3
    assert "/layer.2/ffn" in outcome.out


def test_explain_says_what_was_no_block(cli, folder):
    """Two linears and an activation that no residual stream takes up."""
    s = Sketch()
    s.op("Identity", s.ffn(s.input("x", ["n", 8]), d_out=5), out=s.output("y", ["n", 5]))
    path = s.save(folder / "head.onnx")
    (rejected,) = cli("inspect", path, "--json").json["rejected"]
    assert set(rejected) == {"value", "reason"}
    outcome = cli("inspect", path, "--explain")
    assert outcome.code == 0
    assert " ".join(rejected["reason"].split()[:2]) in outcome.out
    assert rejected["reason"] not in cli("inspect", path).out


def test_one_broken_file_of_several_does_not_stop_the_others(cli, folder, model):
    (folder / "broken.onnx").write_bytes(b"no model")
    outcome = cli("inspect", model, "broken.onnx", "missing.onnx", model, "--json")
    first, broken, missing, last = map(json.loads, outcome.out.splitlines())
    assert outcome.code == 2
    assert first == last
    assert len(first["ffn_blocks"]) == 3
    assert list(broken) == ["model", "error"]
    assert broken["model"] == "broken.onnx"
    assert missing["model"] == "missing.onnx"
    assert len(outcome.err.splitlines()) == 2


def test_one_broken_file_of_several_in_tables(cli, folder, model):
    (folder / "broken.onnx").write_bytes(b"no model")
    outcome = cli("inspect", "broken.onnx", model)
    assert outcome.code == 2
    assert outcome.out.count("8→32") == 3
    assert outcome.err.startswith("ffnfold: broken.onnx: ")


def test_names_with_brackets_are_shown_as_they_are(cli, folder):
    s = Sketch()
    x = s.input("x", ["n", 8])
    s.op("Add", x, s.ffn(x, name="/layers[0]/[/bold]ffn"), out=s.output("y", ["n", 8]))
    path = s.save(folder / "model[red][1].onnx")
    outcome = cli("inspect", path)
    assert outcome.code == 0
    assert "model[red][1].onnx" in outcome.out.replace("\n", "")
    assert "/layers[0]/[/bold]ffn" in outcome.out
