"""The runner: which block is which through a plan, what a pass may not do, and what is checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.builder import Builder
from ffnfold.graph.edit import remove_dead, set_input, set_inputs, substitute
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.passes.base import Context, Pass, PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.proof.gate import BrokenByPass
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from rewriting import feeds_of, rewrite

D = 8
[X] = feeds_of((2, 5, D))
FIT = feeds_of((4, 8, D), 6, seed=11)


@dataclass(frozen=True)
class Doing(Pass):
    """A pass that does what it is told and says that it fired."""

    name: ClassVar[str] = "doing"
    do: Callable[[Model], object] = field(default=lambda model: None)
    fired: int = 1

    def run(self, model: Model, context: Context) -> PassResult:
        self.do(model)
        return self.result(self.fired, [])


def loaded(source: Sketch | onnx.ModelProto, folder: Path) -> Model:
    onnx.save_model(source.model() if isinstance(source, Sketch) else source, folder / "model.onnx")
    return Model.load(folder / "model.onnx")


def node_of(model: Model, op: str) -> object:
    return next(node for node in model.graph.nodes if node.op == op)


def test_passes_run_in_the_order_of_the_plan_and_report_in_it(tmp_path):
    order: list[str] = []
    model = loaded(transformer(1), tmp_path)
    plan = Plan((Doing(lambda model: order.append("first"), 0), Doing(lambda model: order.append("second"), 0)))
    results = run_plan(model, plan)
    assert order == ["first", "second"]
    assert [(result.name, result.fired) for result in results] == [("doing", 0)] * 2
    assert all(result.seconds >= 0 for result in results)


def test_progress_names_each_pass(tmp_path):
    told: list[str] = []
    run_plan(loaded(transformer(1), tmp_path), Plan.parse(["fold-bias", "remove-ffn:keep=nothing"]), progress=told.append)
    assert told == ["fold-bias", "remove-ffn", "remove-ffn: block 0"]


# which block is which


def test_an_index_means_the_block_of_the_input_all_through_the_plan(tmp_path):
    """Block 2 is still block 2 after block 0 is gone: the model with 0 removed and 2 removed is the one expected."""
    s = transformer(4)
    one_by_one, results = rewrite(s, tmp_path, "remove-ffn:blocks=0,keep=nothing", "remove-ffn:blocks=2,keep=nothing")
    assert [result.fired for result in results] == [1, 1]
    at_once, _ = rewrite(s, tmp_path, "remove-ffn:blocks=0+2,keep=nothing")
    assert drift(run(at_once, X), run(one_by_one, X)) < 1e-6


def test_a_block_keeps_its_index_when_it_is_rewritten_but_stays_a_block(tmp_path):
    s = transformer(3, activation="gelu")
    plan = ("remove-ffn:blocks=0,keep=nothing", "quantize-ffn:form=weight-only,blocks=1+2", "remove-ffn:blocks=2,keep=nothing")
    model, (_, quantized, removed) = rewrite(s, tmp_path, *plan)
    assert (quantized.fired, removed.fired, removed.refused) == (2, 1, [])
    stored = {each.name.split("/")[1] for each in model.graph.constants if each.dtype in (np.int8, np.uint8)}
    assert stored == {"layer.1"}


def test_blocks_of_equal_shape_are_not_taken_for_each_other(tmp_path):
    """Pass after pass takes the first block that is left, by its index in the input."""
    s = transformer(4)
    for index in range(4):
        alone, _ = rewrite(s, tmp_path, f"remove-ffn:blocks={index},keep=nothing")
        others = [other for other in range(4) if other != index]
        behind, results = rewrite(s, tmp_path, "fold-norm", f"remove-ffn:blocks={index},keep=nothing",
                                  *(f"quantize-ffn:form=weight-only,blocks={other}" for other in others))
        assert [result.fired for result in results[1:]] == [1, 1, 1, 1]
        assert 0 < drift(run(alone, X), run(tmp_path / "after.onnx", X)) < 0.02
        assert len([node for node in behind.graph.nodes if node.op == "MatMul"]) == 6


@pytest.mark.parametrize(("first", "reason"), [
    ("remove-ffn:blocks=1,keep=nothing", "removed by remove-ffn earlier in the plan"),
    ("linearize-ffn:blocks=1", "made affine by linearize-ffn earlier in the plan")])
@pytest.mark.parametrize("second", ["remove-ffn:keep=nothing", "linearize-ffn", "quantize-ffn"])
def test_a_block_that_is_gone_is_refused_with_what_took_it(tmp_path, first, reason, second):
    _, (_, result) = rewrite(transformer(3), tmp_path, first, second, fit=FIT)
    assert result.fired == 2
    assert [(each.block, each.reason) for each in result.refused] == [(1, reason)]


def test_a_block_that_is_no_block_any_more_is_refused_with_the_pass_that_changed_it(tmp_path):
    def straighten(model: Model) -> None:
        relu = node_of(model, "Relu")
        substitute(model.graph, relu.outputs[0], relu.inputs[0])
        remove_dead(model.graph, [relu])

    model = loaded(transformer(2), tmp_path)
    quantize = Plan.parse(["quantize-ffn"]).passes[0]
    _, result = run_plan(model, Plan((Doing(straighten), quantize)))
    assert result.fired == 1
    [refused] = result.refused
    assert (refused.block, refused.reason) == (0, "no longer an FFN block after doing earlier in the plan")


def test_a_refusal_carries_block_value_and_reason(tmp_path):
    _, [result] = rewrite(transformer(2, gated=True), tmp_path, "linearize-ffn:fit=neuron", fit=FIT)
    assert [each.block for each in result.refused] == [0, 1]
    assert all(each.value for each in result.refused)
    assert result.to_json()["refused"][0] == {"block": 0, "reason": result.refused[0].reason}


# what a pass may not do


def cut_loose(model: Model) -> None:
    node = node_of(model, "Relu")
    set_inputs(node, ())
    list.clear(node.outputs)
    model.graph.nodes = [each for each in model.graph.nodes if each is not node]


def loop_back(model: Model) -> None:
    first = next(node for node in model.graph.nodes if node.op == "MatMul")
    set_input(first, 0, node_of(model, "Relu").outputs[0])


def widen(model: Model) -> None:
    node = next(node for node in model.graph.nodes if node.op == "MatMul")
    set_input(node, 1, Builder(model, model.graph, "/wrong").constant(np.ones((D + 1, 32), np.float32), "weight"))


def misname(model: Model) -> None:
    node_of(model, "Relu").op = "Rellu"


def mistype(model: Model) -> None:
    node = node_of(model, "Relu")
    build = Builder(model, model.graph, "/wrong")
    set_input(node, 0, build.op("Cast", node.inputs[0], to=onnx.TensorProto.INT8))


def define_twice(model: Model) -> None:
    output = node_of(model, "Relu").outputs[0]
    Builder(model, model.graph, "/wrong").nodes("Neg", [model.graph.inputs[0]], [type(output)(output.name)])


@pytest.mark.parametrize("break_it", [cut_loose, loop_back, widen, misname, mistype, define_twice])
def test_a_pass_that_breaks_a_graph_is_named(tmp_path, break_it):
    model = loaded(transformer(1), tmp_path)
    with pytest.raises(BrokenByPass, match="pass 'doing'"):
        run_plan(model, Plan((*Plan.parse(["fold-norm"]), Doing(break_it), *Plan.parse(["fold-bias"]))))


def one_more_output(model: Model) -> None:
    model.graph.outputs.append(node_of(model, "Relu").outputs[0])


def one_more_input(model: Model) -> None:
    model.graph.inputs.append(gs.Variable("more", np.float32, [1]))


def another_shape(model: Model) -> None:
    model.graph.outputs[0].shape = ["batch", "tokens", None]


@pytest.mark.parametrize("change", [one_more_input, one_more_output, another_shape])
def test_inputs_and_outputs_are_written_as_they_were_whatever_a_pass_does(tmp_path, change):
    model = loaded(transformer(1), tmp_path)
    run_plan(model, Plan((Doing(change),)))
    model.save(tmp_path / "out.onnx")
    before, after = onnx.load(tmp_path / "model.onnx").graph, onnx.load(tmp_path / "out.onnx").graph
    assert (list(after.input), list(after.output)) == (list(before.input), list(before.output))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_pass_that_renames_an_input_or_output_is_named(tmp_path, side):
    def rename(model: Model) -> None:
        getattr(model.graph, side)[0].name = "another"

    with pytest.raises(BrokenByPass, match="pass 'doing' broke the graph"):
        run_plan(loaded(transformer(1), tmp_path), Plan((Doing(rename),)))


def test_what_was_wrong_before_is_not_held_against_a_pass(tmp_path):
    """onnx.checker refuses an operator of ONNX Runtime that has no domain; so does it before the plan."""
    s = transformer(1)
    s.op("Relu", s.op("FusedMatMulOfNobody", "y", out="odd", domain=""), out=s.output("z"))
    model = loaded(s, tmp_path)
    [result] = run_plan(model, Plan.parse(["quantize-ffn"]))
    assert result.fired == 1
    assert "FusedMatMulOfNobody" in ops(model)


def test_a_pass_that_says_it_did_nothing_leaves_the_model_as_it_was(tmp_path):
    model = loaded(transformer(2), tmp_path)
    [result] = run_plan(model, Plan.parse(["fuse-matmul"]))
    assert result.fired == 0
    model.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == onnx.load(tmp_path / "model.onnx")


# what is checked before anything runs


def test_an_index_that_is_not_there_is_said_before_anything_runs(tmp_path):
    touched: list[str] = []
    model = loaded(transformer(2), tmp_path)
    plan = Plan((Doing(lambda model: touched.append("yes"), 0), *Plan.parse(["quantize-ffn:blocks=0+2"])))
    with pytest.raises(InputError, match="there is no block 2: the model has blocks 0 to 1"):
        run_plan(model, plan)
    assert touched == []


def test_an_index_in_a_model_without_blocks(tmp_path):
    s = Sketch()
    s.op("Relu", s.input("x", [2, D]), out=s.output("y"))
    with pytest.raises(InputError, match="there is no block 0: the model has no FFN block"):
        run_plan(loaded(s, tmp_path), Plan.parse(["quantize-ffn:blocks=0"]))
    assert run_plan(loaded(s, tmp_path), Plan.parse(["quantize-ffn"]))[0].fired == 0


def test_feeds_that_are_missing_are_said_before_anything_runs(tmp_path):
    touched: list[str] = []
    plan = Plan((Doing(lambda model: touched.append("yes"), 0), *Plan.parse(["linearize-ffn"])))
    with pytest.raises(InputError, match="'linearize-ffn' needs real inputs"):
        run_plan(loaded(transformer(1), tmp_path), plan)
    assert touched == []


def test_feeds_for_fitting_choose_too_where_there_are_no_others(tmp_path):
    model = loaded(transformer(2), tmp_path)
    [result] = run_plan(model, Plan.parse(["remove-ffn:count=1,keep=nothing"]), fit=Feeds.of(FIT))
    assert result.fired == 1
