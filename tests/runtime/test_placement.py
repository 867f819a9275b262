"""Where nodes ran, read from what ONNX Runtime writes down, and what is said about those that fell back to the CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
from ffn_graphs import Sketch, transformer
from ffnfold.graph.errors import InputError
from ffnfold.runtime import Feeds, Variant, open_session
from ffnfold.runtime.entrant import Entrant
from ffnfold.runtime.placement import PlacedNode, Placement, read_trace

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def node(op, provider=CPU, *values, name=""):
    return PlacedNode(name or f"/{op}", op, provider, values or (("float", 8),))


@pytest.fixture
def traced(tmp_path):
    """Opens a sketch with a trace and runs it once."""

    def run(sketch: Sketch, **feed):
        session = open_session(sketch.save(tmp_path / "traced.onnx"), trace=True)
        session.run(feed)
        return session.placement()

    return run


def test_every_node_that_ran_is_there_with_its_types(traced):
    s = Sketch()
    x = s.input("x", ["n", 8])
    s.op("Identity", s.op("Cast", s.op("Relu", x), to=7), out=s.output("y", ["n", 8], 7))
    placement = traced(s, x=np.ones((3, 8), np.float32))
    assert [(each.op, each.provider) for each in placement.nodes] == [("Relu", CPU), ("Cast", CPU)]
    assert placement.nodes[1].values == (("float", 24), ("int64", 24))
    assert placement.by_provider == {CPU: 2}
    assert placement.copies == 0


def test_a_node_that_ran_twice_is_one_node(tmp_path):
    session = open_session(transformer(2).save(tmp_path / "model.onnx"), trace=True)
    feed = {"x": np.ones((1, 2, 8), np.float32)}
    session.run(feed)
    session.run({"x": np.ones((1, 5, 8), np.float32)})
    placement = session.placement()
    assert placement is session.placement()
    names = [each.name for each in placement.nodes]
    assert len(names) == len(set(names)) == placement.by_provider[CPU]
    assert session.run(feed)  # it still runs, unrecorded


def test_nothing_is_recorded_unless_asked(tmp_path):
    session = open_session(transformer(1).save(tmp_path / "model.onnx"))
    session.run({"x": np.ones((1, 2, 8), np.float32)})
    assert session.placement() is None
    session.check_placement()


def test_arithmetic_on_shapes_does_not_compute(traced):
    s = Sketch()
    x = s.input("x", ["n", 8])
    shape = s.op("Shape", x)
    width = s.op("Cast", s.op("Gather", shape, s.weight(np.asarray(1))), to=1)
    root = s.op("Sqrt", width)  # as exporters scale attention
    s.op("Mul", x, root, out=s.output("y", ["n", 8]))
    computes = {each.op: each.computes for each in traced(s, x=np.ones((3, 8), np.float32)).nodes}
    assert computes == {"Shape": False, "Gather": False, "Cast": False, "Sqrt": False, "Mul": True}


def test_an_int8_model_for_the_cpu_is_called_out_with_the_way_to_mend_it():
    placement = Placement((node("Shape", CPU, ("int64", 2)), node("MatMul", CUDA), node("MemcpyToHost", CUDA),
                           *(node("DynamicQuantizeMatMul", CPU, name=f"/layer.{number}/int8") for number in range(5)),
                           node("MemcpyFromHost", CUDA)))
    text = placement.complaint()
    for word in ("5 nodes that compute", "2 copies",
                 "5 DynamicQuantizeMatMul ('/layer.0/int8', '/layer.1/int8', '/layer.2/int8', …)",
                 "quantize-ffn:form=weight-only", "--allow-cpu-nodes"):
        assert word in text
    assert placement.to_json() == {
        "nodes_by_provider": {CPU: 6, CUDA: 3}, "memcpy_nodes": 2,
        "fallback_nodes": [{"name": f"/layer.{number}/int8", "op": "DynamicQuantizeMatMul"} for number in range(5)]}


def test_integer_products_count_as_computing():
    assert node("MatMulInteger", CPU, ("uint8", 64), ("int8", 64), ("int32", 64)).computes


def test_other_operators_without_a_cuda_kernel_get_another_hint():
    text = Placement((node("Det"),)).complaint()
    assert "1 Det ('/Det')" in text
    assert "quantize" not in text


def test_nothing_fell_back_nothing_is_said():
    assert Placement((node("MatMul", CUDA), node("Gather", CPU, ("int64", 1)))).complaint() is None


def test_only_another_provider_than_the_cpu_is_checked(tmp_path):
    session = open_session(transformer(1).save(tmp_path / "model.onnx"), trace=True)
    session.run({"x": np.ones((1, 2, 8), np.float32)})
    session.check_placement()
    session.provider = "cuda"  # what it would be had CUDA no kernels at all
    with pytest.raises(InputError, match=r"model\.onnx: \d+ nodes that compute fell back to the CPU"):
        session.check_placement()


def test_a_name_that_breaks_the_trace_costs_that_node_only(tmp_path):
    event = {"cat": "Node", "name": "/a_kernel_time", "args": {"op_name": "Relu", "provider": CPU, "node_index": "0",
                                                               "output_type_shape": [{"float": [2, 3]}]}}
    broken = json.dumps(event).replace("/a_kernel", '/"a"_kernel')
    path = tmp_path / "trace.json"
    path.write_text("[\n" + ",\n".join([json.dumps(event), broken]) + "\n]\n")
    assert read_trace(path).nodes == (PlacedNode("/a", "Relu", CPU, (("float", 6),)),)


def test_a_variant_is_run_as_it_says(tmp_path):
    s = Sketch(21)
    weight = s.weight(s.random.integers(-127, 127, (64, 64)).astype(np.int8))
    scale = s.weight(np.full(64, 0.01, np.float32))
    product = s.op("MatMul", s.input("x", ["n", 64]), s.op("DequantizeLinear", weight, scale, axis=1))
    s.op("Relu", product, out=s.output("y", ["n", 64]))
    path = s.save(tmp_path / "quantized.onnx")
    feeds = Feeds.of([{"x": np.ones((2, 64), np.float32)}])
    settings = {"provider": "cpu", "threads": 1, "cuda_graph": False, "use_tf32": False, "warm_up": 1, "allow_cpu": False}
    found = {}
    for config in ({}, {"session.disable_quant_qdq": "1"}):
        entrant = Entrant(Variant(path, "int8", config), feeds, **settings)
        found[len(config)] = [each.op for each in entrant.placement.nodes]
        assert entrant.variant.title == "int8"
    assert found == {0: ["MatMulNBits", "Relu"], 1: ["MatMul", "Relu"]}
