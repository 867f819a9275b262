"""Sessions: from a file, from a model in memory, and what they say when they cannot be had."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.runtime import input_specs, open_session
from onnx import TensorProto, helper


def test_a_model_in_memory_runs_like_its_file(workshop, random):
    path = workshop.linear(random.standard_normal((16, 40), np.float32))
    feed = {"x": random.standard_normal((2, 3, 16), np.float32)}
    from_file, from_memory = open_session(path), open_session(Model.load(path))
    np.testing.assert_array_equal(from_file.run(feed)["y"], from_memory.run(feed)["y"])
    assert from_file.inputs == from_memory.inputs == input_specs(Model.load(path))


def test_weights_in_external_data_reach_the_session(workshop, random):
    weight = random.standard_normal((64, 64), np.float32)
    path = workshop.linear(weight, save_as_external_data=True, location="weights.bin", size_threshold=0)
    x = random.standard_normal((1, 2, 64), np.float32)
    for source in (path, Model.load(path)):
        np.testing.assert_allclose(open_session(source).run({"x": x})["y"], np.maximum(x @ weight, 0), rtol=1e-4, atol=1e-4)


def test_a_changed_model_runs_as_changed(workshop, random):
    path = workshop.linear(random.standard_normal((16, 40), np.float32))
    model = Model.load(path)
    next(node for node in model.graph.nodes if node.op == "Relu").op = "Neg"
    feed = {"x": random.standard_normal((2, 3, 16), np.float32)}
    hidden = open_session(path, outputs=["hidden"]).run(feed)["hidden"]
    np.testing.assert_array_equal(open_session(model).run(feed)["y"], -hidden)


@pytest.mark.parametrize("in_memory", [False, True])
def test_values_inside_can_be_asked_for(workshop, random, in_memory):
    weight = random.standard_normal((16, 40), np.float32)
    path = workshop.linear(weight)
    session = open_session(Model.load(path) if in_memory else path, outputs=["hidden", "x"])
    x = random.standard_normal((2, 3, 16), np.float32)
    found = session.run({"x": x}, ["hidden", "x"])
    assert list(found) == ["hidden", "x"]
    np.testing.assert_allclose(found["hidden"], x @ weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found["x"], x)


@pytest.mark.parametrize(("onnx_type", "dtype"), [
    (TensorProto.BFLOAT16, ml_dtypes.bfloat16), (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    (TensorProto.INT4, ml_dtypes.int4), (TensorProto.UINT4, ml_dtypes.uint4)])
def test_weights_of_types_that_numpy_lacks(workshop, random, onnx_type, dtype):
    weight = random.integers(0, 7, (65, 33)).astype(dtype)
    nodes = [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)]
    if onnx_type in (TensorProto.INT4, TensorProto.UINT4):
        nodes = [helper.make_node("DequantizeLinear", ["w", "one"], ["y"])]
    tensor = onnx.numpy_helper.from_array(weight, "w")
    path = workshop.save(nodes, {}, {"y": (TensorProto.FLOAT, [65, 33])}, {"w": tensor, "one": np.ones((), np.float32)})
    for source in (path, Model.load(path)):
        np.testing.assert_array_equal(open_session(source, optimize=False).run({})["y"], weight.astype(np.float32))


def test_bfloat16_goes_in_and_comes_out(workshop):
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    session = open_session(workshop.identity(TensorProto.BFLOAT16, ["n", 3]))
    assert session.inputs[0].dtype == ml_dtypes.bfloat16
    y = session.run({"x": x})["y"]
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))


def test_a_type_without_kernels_is_said_with_what_to_do(workshop, one_line):
    weight = onnx.numpy_helper.from_array(np.ones((3, 4), ml_dtypes.bfloat16), "w")
    path = workshop.save([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (TensorProto.BFLOAT16, ["n", 3])},
                         {"y": (TensorProto.BFLOAT16, ["n", 4])}, {"w": weight})
    with pytest.raises(InputError) as caught:
        open_session(path)
    one_line(caught.value, "model.onnx", "MatMul", "a CPU has none for bfloat16", "convert the model to float32 or float16")


def test_an_input_with_a_default_is_optional(workshop):
    default = np.full(400, 2, np.float32)
    path = workshop.save([helper.make_node("Mul", ["x", "scale"], ["y"])],
                         {name: (TensorProto.FLOAT, [400]) for name in ("x", "scale")}, {"y": (TensorProto.FLOAT, [400])},
                         {"scale": default})
    x = np.ones(400, np.float32)
    for source in (path, Model.load(path)):
        session = open_session(source)
        assert {spec.name: spec.optional for spec in session.inputs} == {"x": False, "scale": True}
        assert (session.run({"x": x})["y"] == 2).all()
        assert (session.run({"x": x, "scale": 3 * default})["y"] == 6).all()


def test_an_input_with_a_default_is_optional_where_only_a_value_before_it_is_wanted(workshop):
    path = workshop.save([helper.make_node("Neg", ["x"], ["between"]), helper.make_node("Mul", ["between", "scale"], ["y"])],
                         {name: (TensorProto.FLOAT, [400]) for name in ("x", "scale")}, {"y": (TensorProto.FLOAT, [400])},
                         {"scale": np.full(400, 2, np.float32)})
    session = open_session(Model.load(path), outputs=["between"], only=True)
    assert (session.run({"x": np.ones(400, np.float32)}, ["between"])["between"] == -1).all()


def test_what_cannot_be_opened_is_said_in_one_line(workshop, tmp_path, one_line, capfd):
    path = workshop.linear(np.ones((16, 40), np.float32))
    (tmp_path / "text.onnx").write_text("no model")
    for attempt, words in ((lambda: open_session(tmp_path / "none.onnx"), ["none.onnx", "no such file"]),
                           (lambda: open_session(tmp_path / "text.onnx"), ["text.onnx", "cannot load"]),
                           (lambda: open_session(path, outputs=["nowhere"]), ["nowhere"]),
                           (lambda: open_session(path, provider="tpu"), ["tpu", "cpu, cuda"]),
                           (lambda: open_session(path, threads=0), ["threads=0"])):
        with pytest.raises(InputError) as caught:
            attempt()
        one_line(caught.value, *words)
    assert capfd.readouterr() == ("", "")


def test_a_run_that_fails_is_said_in_one_line(workshop, one_line, capfd):
    session = open_session(workshop.linear(np.ones((16, 40), np.float32)))
    for feed in ({}, {"x": np.ones((1, 2, 16))}, {"x": np.ones((1, 2, 17), np.float32)}, {"z": np.ones(1)}):
        with pytest.raises(InputError) as caught:
            session.run(feed)
        one_line(caught.value, "linear.onnx")
    with pytest.raises(InputError, match="no output 'z'"):
        session.run({"x": np.ones((1, 2, 16), np.float32)}, ["z"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_cuda_without_cuda_says_what_to_install(workshop, one_line):
    with pytest.raises(InputError) as caught:
        open_session(workshop.linear(np.ones((16, 40), np.float32)), provider="cuda")
    one_line(caught.value, "cuda", "pip install 'ffnfold[gpu]'")


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives(workshop, random):
    path = workshop.linear(random.standard_normal((64, 64), np.float32))
    feed = {"x": random.standard_normal((2, 3, 64), np.float32)}
    expected = open_session(path).run(feed)["y"]
    for source in (path, Model.load(path)):
        np.testing.assert_allclose(open_session(source, provider="cuda").run(feed)["y"], expected, rtol=1e-4, atol=1e-4)
