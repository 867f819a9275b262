"""What mutated files brought up (benchmarks/fuzz_load.py, fuzz_atheris.py), each as the smallest model that shows it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.graph.report import describe
from ffnfold.passes.optimize import Job, optimize_file
from ffnfold.passes.plan import EXACT_PLAN, Plan
from onnx import AttributeProto, TensorProto, helper

FEED = {"x": np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)}


def optimized(model: onnx.ModelProto | bytes, folder: Path) -> tuple[Path, dict]:
    """``model`` after the exact plan, and the report."""
    path = folder / "m.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    describe(path)
    report = optimize_file(Job(path, folder / "out.onnx", Plan.parse(EXACT_PLAN), verify=False))
    return folder / "out.onnx", report


def fired(report: dict) -> dict[str, int]:
    return {each["name"]: each["fired"] for each in report["passes"]}


def same(model: onnx.ModelProto, folder: Path, feed=FEED) -> dict[str, int]:
    """The exact plan changes no output of ``model``; returns what fired."""
    before = run(model, feed)
    path, report = optimized(model, folder)
    after = run(path, feed)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-4, atol=1e-5)
    return fired(report)


def refused(model: onnx.ModelProto | bytes, folder: Path, *words: str) -> None:
    """``model`` is an error of one line that says ``words``, and nothing is written."""
    with pytest.raises(InputError) as raised:
        optimized(model, folder)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 2500
    assert [file.name for file in folder.iterdir()] == ["m.onnx"]
    for word in words:
        assert word in text, text


def test_a_model_without_outputs_is_left_as_it_is(tmp_path):
    model = transformer(1).model()
    del model.graph.output[:]
    path, report = optimized(model, tmp_path)
    assert fired(report)["clean-up"] == 0
    assert len(onnx.load(path).graph.node) > 5


def test_value_info_of_an_inner_graph_may_speak_of_the_values_around_it(tmp_path):
    s = Sketch()
    x = s.input("x", [None, 8])
    scale, weight = s.weight(2 + s.numbers(8), "scale"), s.weight(s.numbers(8, 8), "w")
    normed = s.op("LayerNormalization", x, scale, axis=-1)
    s.op("MatMul", normed, weight, out="z")
    inner = Sketch()
    inner.info("scale", [8])
    inner.op("Mul", "z", "scale", out=inner.output("then"))
    other = Sketch()
    other.info("z", [None, 8])
    other.op("Identity", "z", out=other.output("else"))
    positive = s.op("Greater", s.op("ReduceMax", x, keepdims=0), s.number(0))
    s.op("If", positive, out=s.output("y", [None, 8]), then_branch=inner.graph(), else_branch=other.graph())
    same(s.model(), tmp_path)


def test_an_attribute_of_a_function_outside_of_any_is_refused(tmp_path):
    model = transformer(1).model()
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(a for a in node.attribute if a.name == "axis").ref_attr_name = "axis"
    refused(model, tmp_path, node.name, "'axis'", "function")


@pytest.mark.parametrize(("op", "domain", "opset"), [
    ("MatMulNBits", "com.microsoft", 17), ("FusedMatMul", "com.microsoft", 17), ("SimplifiedLayerNormalization", "", 17),
    ("LayerNormalization", "", 9), ("Gemm", "", 1 << 62)])
def test_attributes_of_the_wrong_type_are_refused_whoever_defines_the_operator(tmp_path, op, domain, opset):
    s = Sketch(opset)
    needed = {"K": 8, "N": 8, "block_size": 16} if op == "MatMulNBits" else {}
    wrong = {"MatMulNBits": "bits", "FusedMatMul": "alpha", "Gemm": "alpha"}.get(op, "axis")
    s.op(op, s.input("x", [None, 8]), s.weight(s.numbers(8)), s.weight(s.numbers(8)), domain=domain, out=s.output("y"), **needed)
    s.nodes[-1].attribute.append(AttributeProto(name=wrong, type=AttributeProto.TYPE_PROTO))
    refused(s.model(), tmp_path, f"'{wrong}'", op)


def test_metadata_that_is_no_text_stays_as_it_is(tmp_path):
    data = transformer(1).model().SerializeToString()
    entry = b"\x0a\x02\xff\xfe" + b"\x12\x01v"  # a StringStringEntryProto whose key is not UTF-8
    path, report = optimized(data + b"\x72" + bytes([len(entry)]) + entry, tmp_path)
    assert sum(fired(report).values()) > 0
    assert entry in path.read_bytes()


CONSTANTS = {
    "shapes that do not broadcast": lambda s: s.op("Add", s.weight(s.numbers(8, 8)), s.weight(s.numbers(7, 7))),
    "an axis that is not there": lambda s: s.op("Gather", s.weight(s.numbers(8)), s.weight(np.int64(3)), axis=5),
    "a number without axes": lambda s: s.op("Gather", s.weight(np.float32(8)), s.weight(np.int64(0))),
    "an index that is not there": lambda s: s.op("Gather", s.weight(s.numbers(8, 8)), s.weight(np.arange(90, 98))),
    "a permutation that is none": lambda s: s.op("Transpose", s.weight(s.numbers(8, 8)), perm=[0, 7]),
    "more axes than can be": lambda s: s.op("Reshape", s.weight(s.numbers(8, 8)), s.weight(np.ones(500_000, np.int64))),
    "a zero step": lambda s: s.op("Slice", s.weight(s.numbers(8, 8)), *(s.weight(np.array([i])) for i in (0, 8, 0, 0))),
    "more numbers than memory": lambda s: s.op("Add", s.weight(s.numbers(1 << 16, 1)), s.weight(s.numbers(1, 1 << 16))),
    "blocks without end": lambda s: s.op("DequantizeLinear", s.weight(np.ones((8, 8), np.int8)), s.weight(s.numbers(1, 8)),
                                         axis=0, block_size=1 << 62),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_that_cannot_be_computed_are_no_weights(tmp_path, kind):
    s = Sketch(21)
    s.op("MatMul", s.input("x", [None, 8]), CONSTANTS[kind](s), out=s.output("y"))
    started = time.process_time()
    with contextlib.suppress(InputError):
        optimized(s.model(), tmp_path)
    try:
        describe(tmp_path / "m.onnx")
    except InputError as error:
        assert str(tmp_path / "m.onnx") in str(error)  # noqa: PT017 - most are no error
    assert time.process_time() - started < 5


def test_a_constant_that_doubles_forty_times_takes_no_time(tmp_path):
    s = Sketch()
    w = s.weight(s.numbers(8, 8, scale=1e-9))
    for _ in range(40):
        w = s.op("Add", w, w)
    s.op("MatMul", s.input("x", [None, 8]), w, out=s.output("y"))
    started = time.process_time()
    same(s.model(), tmp_path)
    assert time.process_time() - started < 5


def test_an_activation_that_cannot_be_computed_is_none(tmp_path):
    s = transformer(1, activation="relu")
    relu = next(node for node in s.nodes if node.op_type == "Relu")
    relu.op_type = "Max"
    relu.input.append(s.weight(np.zeros(0, np.float32)))
    path = s.save(tmp_path / "m.onnx")
    assert describe(path)["ffn_blocks"] == []


def test_one_matrix_with_a_third_axis_is_not_taken_for_a_matrix(tmp_path):
    s = Sketch()
    x = s.input("x", [None, 8])
    up = s.op("Add", s.op("MatMul", s.norm(x, 8), s.weight(s.numbers(1, 8, 32))), s.weight(s.numbers(32)))
    down = s.op("Add", s.op("MatMul", s.op("Relu", up), s.weight(s.numbers(1, 32, 8))), s.weight(s.numbers(8)))
    narrow = s.op("MatMul", s.op("MatMul", down, s.weight(s.numbers(1, 8, 8))), s.weight(s.numbers(1, 8, 2)))
    s.op("Add", x, down, out=s.output("y"))
    s.op("Identity", narrow, out=s.output("z"))
    same(s.model(), tmp_path)


def test_a_bias_that_the_caller_may_override_is_no_bias_to_merge(tmp_path):
    s = Sketch()
    x = s.input("x", [None, 8])
    first, second = s.linear(x, 8, 4), s.linear(x, 8, 4)
    s.op("Concat", first, second, axis=-1, out=s.output("y"))
    for node in s.nodes:
        if node.op_type == "Add":
            s.input(node.input[1], [4])
    same(s.model(), tmp_path)


@pytest.mark.parametrize(("op", "count"), [("Add", 3), ("Relu", 2), ("MatMul", 5)])
def test_more_inputs_than_an_operator_takes_are_refused(tmp_path, op, count):
    s = Sketch()
    s.op(op, *[s.input("x", [8, 8])] * count, out=s.output("y"))
    refused(s.model(), tmp_path, op, f"{count} inputs")


def test_many_linears_on_one_stream_are_looked_at_in_no_time(tmp_path):
    s = Sketch()
    x = s.input("x", [None, 8])
    for _ in range(500):
        x = s.op("Add", x, s.op("MatMul", x, s.weight(s.numbers(8, 8, scale=0.01))))
    s.op("Tanh", x, out=s.output("y"))
    path = s.save(tmp_path / "m.onnx")
    started = time.process_time()
    describe(path)
    assert time.process_time() - started < 4


def test_a_name_without_end_is_cut_in_the_message(tmp_path):
    model = transformer(1).model()
    model.graph.node[0].input[0] = "n" * 60_000
    refused(model, tmp_path, "nothing defines", "nnn …")


@pytest.mark.parametrize("length", [70_000, 40 << 20])
def test_a_name_that_no_model_has_is_refused(tmp_path, length):
    model = transformer(1).model()
    model.graph.node[0].name = "n" * length
    refused(model, tmp_path, str(length))


def test_more_nodes_than_a_graph_has_are_refused(tmp_path):
    graph = b"\x0a\x00" * 300_000  # nodes of no bytes: each would take a thousand times its size
    size = len(graph)
    length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    refused(b"\x08\x0a\x3a" + length + graph, tmp_path, "nodes")


def test_twins_without_number_are_shared_in_no_time(tmp_path):
    s = Sketch()
    x = s.input("x", [None, 8])
    for _ in range(4000):
        x = s.op("Mul", x, s.weight(np.full(8, 1.001, np.float32)))
    s.op("Tanh", x, out=s.output("y"))
    path = s.save(tmp_path / "m.onnx")
    started = time.process_time()
    report = optimize_file(Job(path, tmp_path / "out.onnx", Plan.parse(["dedupe-weights"]), verify=False))
    assert fired(report) == {"dedupe-weights": 3999}
    assert time.process_time() - started < 4
    assert len(Model.load(tmp_path / "out.onnx").proto.graph.initializer) == 1


def test_tensor_names_do_not_hide_weights_of_the_wrong_type(tmp_path):
    s = transformer(1)
    model = s.model()
    model.graph.initializer[0].data_type = TensorProto.STRING
    refused(model, tmp_path, model.graph.initializer[0].name)


def test_an_operator_of_an_operator_set_without_a_version_is_left_alone(tmp_path):
    s = Sketch()
    s.op("Relu", s.input("x", [None, 8]), out=s.output("y"))
    model = s.model()
    model.opset_import.append(helper.make_opsetid("someone's", -1))
    path, _ = optimized(model, tmp_path)
    assert onnx.load(path).opset_import[-1].version == -1
