"""clean-up: what it takes out, and what it must leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from onnx import TensorProto, helper, numpy_helper

X = {"x": np.linspace(-2, 3, 8, dtype=np.float32).reshape(2, 4)}


def clean(source: Sketch | onnx.ModelProto, folder: Path) -> tuple[Model, PassResult]:
    """The model after clean-up, read back from the file it was written to."""
    proto = source.model() if isinstance(source, Sketch) else source
    path = folder / "model.onnx"
    onnx.save_model(proto, path)
    model = Model.load(path)
    [result] = run_plan(model, Plan.parse(["clean-up"]), threads=1)
    model.save(folder / "clean.onnx")
    return Model.load(folder / "clean.onnx"), result


def sketch(opset: int = 17) -> tuple[Sketch, str]:
    s = Sketch(opset)
    return s, s.input("x", [2, 4])


def names(model: Model) -> set[str]:
    return {tensor.name for tensor in model.proto.graph.initializer}


def test_identity_between_nodes_goes(tmp_path):
    s, x = sketch()
    s.op("Relu", s.op("Identity", s.op("Neg", x)), out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert ops(model) == ["Neg", "Relu"]
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) == 0


def test_identity_behind_an_input_and_before_an_output_goes_and_the_names_stay(tmp_path):
    s, x = sketch()
    s.op("Identity", s.op("Relu", s.op("Identity", x)), out=s.output("y"))
    model, _ = clean(s, tmp_path)
    assert ops(model) == ["Relu"]
    assert run(model, X)["y"].tolist() == run(s.model(), X)["y"].tolist()


def test_weight_behind_identity_becomes_the_weight(tmp_path):
    s, x = sketch()
    weight = s.op("Identity", s.weight(s.numbers(4, 3)))
    s.op("MatMul", x, weight, out=s.output("y"))
    model, _ = clean(s, tmp_path)
    assert ops(model) == ["MatMul"]
    assert drift(run(s.model(), X), run(model, X)) == 0


@pytest.mark.parametrize("source", ["input", "initializer", "output"])
def test_identity_that_names_an_output_stays(tmp_path, source):
    s, x = sketch()
    if source == "input":
        s.op("Identity", x, out=s.output("y"))
    elif source == "initializer":
        s.op("Identity", s.weight(s.numbers(2, 4)), out=s.output("y"))
    else:
        s.op("Identity", s.op("Neg", x, out=s.output("z")), out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert "Identity" in ops(model)
    assert result.fired == 0


def test_dropout_in_inference_goes(tmp_path):
    s, x = sketch()
    s.op("Relu", s.op("Dropout", x, s.number(0.5)), out=s.output("y"))
    model, _ = clean(s, tmp_path)
    assert ops(model) == ["Relu"]
    assert drift(run(s.model(), X), run(model, X)) == 0


def test_dropout_that_trains_stays(tmp_path):
    s, x = sketch()
    s.op("Relu", s.op("Dropout", x, s.number(0.5), s.weight(np.asarray(True))), out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert ops(model) == ["Dropout", "Relu"]
    assert "may train" in result.refused[0].reason


def test_dropout_whose_training_mode_may_be_given_stays(tmp_path):
    s, x = sketch()
    mode = s.input("mode", [], TensorProto.BOOL)
    s.weight(np.asarray(False), "mode")
    s.op("Relu", s.op("Dropout", x, s.number(0.5), mode), out=s.output("y"))
    model, _ = clean(s, tmp_path)
    assert ops(model) == ["Dropout", "Relu"]


def test_dropout_whose_mask_is_read_stays(tmp_path):
    s, x = sketch()
    s.op("Dropout", x, out=["kept", "mask"])
    s.op("Where", "mask", "kept", s.number(0), out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert "Dropout" in ops(model)
    assert "mask" in result.refused[0].reason


def test_dead_nodes_and_what_only_they_read_go(tmp_path):
    s, x = sketch()
    s.op("MatMul", s.op("Exp", x), s.weight(s.numbers(4, 3), "unread"))
    s.op("Relu", x, out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert ops(model) == ["Relu"]
    assert result.fired == 2
    assert names(model) == set()


def test_a_node_read_only_inside_a_branch_stays(tmp_path):
    s, x = sketch()
    s.op("Exp", x, out="outer")
    flag = s.input("flag", [], TensorProto.BOOL)
    branches = [helper.make_graph([helper.make_node(op, ["outer"], [f"{op}_y"])], op, [],
                                  [helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, [2, 4])])
                for op in ("Relu", "Neg")]
    s.op("If", flag, out=s.output("y"), then_branch=branches[0], else_branch=branches[1])
    model, result = clean(s, tmp_path)
    assert ops(model) == ["Exp", "If"]
    assert result.fired == 0


def test_what_a_branch_gives_out_by_name_alone_stays(tmp_path):
    s, x = sketch()
    s.op("Identity", s.op("Exp", x), out="outer")
    flag = s.input("flag", [], TensorProto.BOOL)
    then = helper.make_graph([], "then", [], [helper.make_tensor_value_info("outer", TensorProto.FLOAT, [2, 4])])
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "else", [],
                              [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4])])
    s.op("If", flag, out=s.output("y"), then_branch=then, else_branch=other)
    model, _ = clean(s, tmp_path)  # ONNX Runtime refuses such a graph, so that only the graph can be looked at
    assert "outer" in {name for node in model.proto.graph.node for name in node.output}


def test_dead_nodes_of_unknown_operator_sets_stay(tmp_path):
    s, x = sketch()
    s.op("Log", x, domain="custom.logging", out="logged")
    s.op("Relu", x, out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert ops(model) == ["Log", "Relu"]
    assert result.fired == 0


def test_unused_initializers_and_stale_value_info_go(tmp_path):
    s, x = sketch()
    s.weight(s.numbers(64, 64), "unread")
    s.info("nowhere", [1, 2])
    s.op("Relu", x, out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert names(model) == set()
    assert not model.proto.graph.value_info
    assert result.fired == 2


def test_an_unused_initializer_that_is_an_input_or_an_output_stays(tmp_path):
    s, x = sketch()
    s.weight(s.numbers(2, 4), s.input("default", [2, 4]))
    s.weight(s.numbers(2, 4), s.output("table", [2, 4]))
    s.op("Relu", x, out=s.output("y"))
    model, result = clean(s, tmp_path)
    assert names(model) == {"default", "table"}
    assert result.fired == 0


def test_a_name_that_means_something_else_inside_is_not_brought_there(tmp_path):
    """An inner graph that hides ``hidden``: the outer value of that name cannot be read where the Identity's was."""
    s, x = sketch()
    s.op("Identity", s.op("Exp", x, out="hidden"), out="outer")
    flag = s.input("flag", [], TensorProto.BOOL)
    hidden = numpy_helper.from_array(np.full((2, 4), 7, np.float32), "hidden")
    then = helper.make_graph([helper.make_node("Add", ["outer", "hidden"], ["t"])], "then", [],
                             [helper.make_tensor_value_info("t", TensorProto.FLOAT, [2, 4])], [hidden])
    other = helper.make_graph([helper.make_node("Relu", ["outer"], ["z"])], "else", [],
                              [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4])])
    s.op("If", flag, out=s.output("y"), then_branch=then, else_branch=other)
    model, _ = clean(s, tmp_path)
    assert ops(model) == ["Exp", "Identity", "If"]


def test_nothing_to_do_leaves_the_proto_as_it_was(tmp_path):
    s = transformer()
    s.nodes[-1].op_type = "Neg"
    model, result = clean(s, tmp_path)
    assert result.fired == 0
    assert list(model.proto.graph.node) == list(s.graph().node)
