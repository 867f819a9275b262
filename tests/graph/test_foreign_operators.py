"""Operators of sets that nobody here knows, called as standard ones are: nothing is taken for granted of them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from ffn_graphs import Sketch
from ffnfold.graph.edit import set_input
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.optimize import Job, optimize_file
from ffnfold.passes.plan import EXACT_PLAN, Plan

D, WIDE = 8, 32
NAMES = ["Add", "Cast", "Concat", "DequantizeLinear", "Gather", "Identity", "MatMul", "Mul", "Relu", "Reshape", "Shape",
         "Transpose"]


def block(folder: Path, op: str, domain: str, *, reads: bool) -> Path:
    """x + down(relu(op(up x)))"""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = s.linear(x, D, WIDE)
    hidden = s.op("Relu", s.op(op, *([up] if reads else []), domain=domain))
    s.op("Add", x, s.linear(hidden, WIDE, D), out=s.output("y"))
    path = folder / "m.onnx"
    path.write_bytes(s.model().SerializeToString())
    return path


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("op", NAMES)
def test_they_are_no_part_of_a_block_and_stay(tmp_path, op, reads):
    path = block(tmp_path, op, "someone.else", reads=reads)
    assert not list(find_ffn_blocks(Model.load(path)))
    optimize_file(Job(path, tmp_path / "out.onnx", Plan.parse(EXACT_PLAN), verify=False))
    before, after = ([node for node in onnx.load(file).graph.node if node.domain] for file in (path, tmp_path / "out.onnx"))
    assert before == after
    assert not reads or path.read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_the_standard_operator_is_a_part_of_the_block(tmp_path):
    assert len(find_ffn_blocks(Model.load(block(tmp_path, "Identity", "", reads=True)))) == 1


def test_they_keep_name_and_set_when_they_are_edited(tmp_path):
    model = Model.load(block(tmp_path, "Reshape", "someone.else", reads=True))
    [node] = [each for each in model.graph.nodes if each.domain == "someone.else"]
    set_input(node, 0, model.graph.inputs[0])
    model.save(tmp_path / "out.onnx")
    [written] = [each for each in onnx.load(tmp_path / "out.onnx").graph.node if each.domain == "someone.else"]
    assert (written.op_type, list(written.input)) == ("Reshape", ["x"])


def test_an_operator_of_onnx_runtime_that_has_a_standard_name_is_what_it_is(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.op("Gelu", s.linear(x, D, WIDE), domain="com.microsoft")
    s.op("Add", x, s.linear(hidden, WIDE, D), out=s.output("y"))
    (tmp_path / "m.onnx").write_bytes(s.model().SerializeToString())
    [found] = find_ffn_blocks(Model.load(tmp_path / "m.onnx"))
    assert found.activation.name == "gelu"

