"""to-half: what is in 16 bits afterwards, what stays in 32, and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.graph.tensors import tensors
from ffnfold.passes.base import Context, PassResult
from ffnfold.passes.half.half_graph import _drop_repeated_casts
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.passes.to_half import ToHalf
from onnx import TensorProto, helper

D, FF = 64, 256
X = {"x": np.random.default_rng(3).normal(size=(2, 5, D)).astype(np.float32)}


def halve(s: Sketch, folder: Path, options: str = "", external: bool = False) -> tuple[Model, PassResult]:
    s.save(folder / "model.onnx", save_as_external_data=external, location="model.data", size_threshold=0)
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse(["to-half" + (options and f":{options}")]), threads=1)
    model.save(folder / "half.onnx")
    return Model.load(folder / "half.onnx"), result


def types(model: Model) -> Counter[int]:
    """Element types of the weights."""
    return Counter(tensor.data_type for tensor, _ in tensors(model.to_proto()[0]) if int(np.prod(tensor.dims)) >= D)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_weights_are_half_and_the_edges_stay(tmp_path, opset, external):
    s = transformer(2, D, FF, opset=opset, activation="gelu", pre_norm=opset >= 17)
    model, result = halve(s, tmp_path, external=external)
    assert (result.fired, result.notes) == (1, ())
    assert set(types(model)) == {TensorProto.FLOAT16}
    before = sum(file.stat().st_size for file in tmp_path.glob("model*"))
    after = sum(file.stat().st_size for file in tmp_path.glob("half*"))
    assert after < 0.55 * before
    assert model.external == external
    outputs = run(tmp_path / "half.onnx", X)
    assert outputs["y"].dtype == np.float32
    assert 0 < drift(run(s.model(), X), outputs) < 3e-3


def test_blocks_are_found_again_and_quantized_in_the_same_plan(tmp_path):
    s = transformer(3, D, FF, activation="silu", gated=True)
    onnx.save_model(s.model(), tmp_path / "model.onnx")
    for options in ("", ":form=nbits", ":bits=4", ":form=weight-only"):
        model = Model.load(tmp_path / "model.onnx")
        plan = Plan.parse(["quantize-ffn:blocks=0", "to-half", f"quantize-ffn{options or ':blocks=1-2'}"])
        results = run_plan(model, plan, threads=1)
        assert [result.fired for result in results] == [1, 1, 2], [each.refused for each in results]
        assert [block.quantized for block in find_ffn_blocks(model)] == [True] * 3
        assert drift(run(s.model(), X), run(model, X)) < (0.3 if "bits" in options else 0.03)


def test_what_has_no_form_in_16_bits_stays_in_float(tmp_path):
    s = transformer(2, D, FF, activation="relu", pre_norm=False)
    onnx.save_model(s.model(), tmp_path / "model.onnx")
    model = Model.load(tmp_path / "model.onnx")
    results = run_plan(model, Plan.parse(["quantize-ffn:blocks=0,row_scale=false", "to-half"]), threads=1)
    assert [result.fired for result in results] == [1, 1]
    assert ops(model).count("DynamicQuantizeLinear") == 2
    assert drift(run(s.model(), X), run(model, X)) < 0.03


def test_operators_and_nodes_that_are_named_stay(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    y = s.op("Softmax", s.linear(x, D, D, name="/first"), axis=-1, name="/softmax")
    s.op("MatMul", y, s.weight(s.numbers(D, D), "last"), name="/last/MatMul", out=s.output("y", ["batch", "tokens", D]))
    model, _ = halve(s, tmp_path)
    assert ops(model).count("Cast") == 2
    for keep, casts in (("Softmax", 4), ("/last/MatMul", 2), ("Softmax+/last/MatMul", 2), ("MatMul+Add", 4)):
        model, result = halve(s, tmp_path, f"keep={keep}")
        assert result.fired == 1
        assert ops(model).count("Cast") >= casts, keep
        last = next(node for node in model.graph.nodes if node.name == "/last/MatMul")
        assert (last.inputs[1]._values.onnx_type == TensorProto.FLOAT) == ("MatMul" in keep)
        assert drift(run(s.model(), X), run(model, X)) < 3e-3


def rms_norm(s: Sketch, x: str) -> str:
    """As the dynamo exporter writes it: ONNX Runtime leaves it in pieces."""
    mean = s.op("ReduceMean", s.op("Pow", x, s.number(2)), s.weight(np.asarray([-1])), keepdims=1)
    root = s.op("Reciprocal", s.op("Sqrt", s.op("Add", mean, s.number(1e-6))))
    return s.op("Mul", s.op("Mul", x, root), s.weight(s.numbers(D, scale=1.0)))


def test_a_norm_in_pieces_stays_in_float_as_its_squares_overflow(tmp_path):
    s = Sketch(opset=20)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Identity", s.ffn(rms_norm(s, x), D, FF, activation="silu", gated=True), out=s.output("y", ["batch", "tokens", D]))
    feed = {"x": X["x"] * 2000}
    model, _ = halve(s, tmp_path)
    assert drift(run(s.model(), feed), run(model, feed)) < 3e-3
    pieces = [node for node in model.graph.nodes if node.op in ("Pow", "ReduceMean", "Sqrt", "Reciprocal")]
    assert not any(reader.op == "Cast" for node in pieces for reader in node.outputs[0].outputs), "not by way of float16"
    model, _ = halve(s, tmp_path, "norms=half")
    assert ops(model).count("Cast") == 2, "only at the edges"


def test_sizes_that_are_computed_as_numbers_stay_whole(tmp_path):
    """Half of 4,099 rows: float16 has no number between 4,096 and 4,100. The constant is one that a node computes."""
    s = Sketch()
    x = s.input("x", ["rows", D])
    rows = s.op("Gather", s.op("Shape", x), s.weight(np.asarray([0])), axis=0)
    two = s.op("Sqrt", s.weight(np.asarray([4], np.float32)))
    half = s.op("Cast", s.op("Div", s.op("Cast", rows, to=TensorProto.FLOAT), two), to=TensorProto.INT64)
    y = s.op("MatMul", x, s.weight(s.numbers(D, D)))
    zero = s.weight(np.asarray([0]))
    s.op("Slice", y, zero, half, zero, out=s.output("y", [None, D]))
    model, result = halve(s, tmp_path)
    assert result.fired == 1
    assert set(types(model)) == {TensorProto.FLOAT16}
    casts = [node for node in model.graph.nodes if node.op == "Cast" and node.attrs["to"] == TensorProto.FLOAT16]
    narrowed = [node.inputs[0].name for node in casts]
    assert narrowed == ["x"], "no size passes through 16 bits"
    feed = {"x": np.ones((4099, D), np.float32)}
    assert run(s.model(), feed)["y"].shape == run(model, feed)["y"].shape == (2049, D)


def test_numbers_that_are_too_large_are_cut_and_counted(tmp_path):
    s = Sketch()
    x = s.input("x", ["rows", D])
    weight = s.numbers(D, FF)
    weight[3, 5], weight[4, 6] = 1e6, -1e6
    mask = np.zeros(FF, np.float32)
    mask[1] = -np.inf
    y = s.op("Add", s.op("MatMul", x, s.weight(weight)), s.weight(mask))
    s.op("Softmax", y, out=s.output("y"))
    model, result = halve(s, tmp_path)
    assert result.notes == ("2 numbers in its weights lie beyond 65504 and became 65504",)
    stored = next(node for node in model.graph.nodes if node.op == "MatMul").inputs[1]._values.load()
    assert (stored[3, 5], stored[4, 6]) == (65504, -65504)
    assert next(node for node in model.graph.nodes if node.op == "Add").inputs[1]._values.load()[1] == -np.inf


def test_numbers_in_constant_nodes_and_subgraphs(tmp_path):
    def branch(name: str, factor: float) -> onnx.GraphProto:
        s = Sketch(seed=int(factor))
        nodes = [helper.make_node("Constant", [], ["factor"], value_float=factor),
                 helper.make_node("MatMul", ["x", "weight"], ["product"]), helper.make_node("Mul", ["product", "factor"], [name])]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
                                 [onnx.numpy_helper.from_array(s.numbers(D, D), "weight")])

    s = Sketch()
    s.input("x", ["batch", "tokens", D])
    s.input("flag", [], TensorProto.BOOL)
    y = s.op("If", "flag", then_branch=branch("then", 2.0), else_branch=branch("otherwise", 3.0))
    third = s.op("Constant", value_floats=[0.5] * D)
    s.op("Add", y, third, out=s.output("y", ["batch", "tokens", D]))
    model, result = halve(s, tmp_path)
    assert result.fired == 1, result.refused
    assert set(types(model)) == {TensorProto.FLOAT16}
    for flag in (True, False):
        feed = {**X, "flag": np.asarray(flag)}
        assert drift(run(s.model(), feed), run(model, feed)) < 3e-3


def test_bfloat16_is_for_cuda(tmp_path):
    s = transformer(2, D, FF, activation="gelu")
    model, result = halve(s, tmp_path, "dtype=bfloat16")
    assert result.fired == 0
    assert "Could not find an implementation" in result.refused[0].reason
    model = Model.load(tmp_path / "model.onnx")
    [result] = run_plan(model, Plan.parse(["to-half:dtype=bfloat16"]), provider="cuda", threads=1)
    assert result.fired == 1
    assert set(types(model)) == {TensorProto.BFLOAT16}
    model.save(tmp_path / "half.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "half.onnx"), full_check=True)
    models = [Model.load(tmp_path / name) for name in ("half.onnx", "model.onnx")]
    products = [next(node for node in model.graph.nodes if node.op == "MatMul") for model in models]
    weight, original = (node.inputs[1]._values.load() for node in products)
    assert np.array_equal(weight, original.astype(weight.dtype)), "rounded once, not by way of float16"


def test_what_is_left_alone(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["rows", D])
    s.op("Add", x, s.ffn(x, D, FF), out=s.output("y"))
    _, result = halve(s, tmp_path)
    assert (result.fired, result.refused[0].reason) == (0, "it has no weights in float32")
    s.op("Cast", s.op("Mul", s.op("Cast", x, to=TensorProto.FLOAT), s.weight(np.ones(D, np.float32))), to=TensorProto.FLOAT16,
         out=s.output("z"))
    _, result = halve(s, tmp_path, "dtype=bfloat16")
    assert "float16 already" in result.refused[0].reason


def test_what_passes_made_before_is_forgotten(tmp_path):
    """Constants are shared by the identity of the graph they are in, and the graph is another one afterwards."""
    s = transformer(1, D, FF)
    onnx.save_model(s.model(), tmp_path / "model.onnx")
    context = Context(memo={"made": 1})
    assert ToHalf().run(Model.load(tmp_path / "model.onnx"), context).fired == 1
    assert not context.memo


def test_casts_that_the_converter_wrote_twice_are_one():
    casts = [helper.make_node("Cast", ["x"], [output], name="x_cast_to_fp32_node", to=TensorProto.FLOAT) for output in ("a", "b")]
    readers = [helper.make_node("Neg", [name], [f"-{name}"]) for name in ("a", "b")]
    graph = helper.make_graph([*casts, *readers], "two", [], [])
    _drop_repeated_casts(graph)
    assert [(node.op_type, list(node.input)) for node in graph.node] == [("Cast", ["x"]), ("Neg", ["a"]), ("Neg", ["a"])]
