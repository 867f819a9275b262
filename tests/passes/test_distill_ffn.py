"""distill-ffn: what other passes put in moves together, towards the original; what it leaves alone, and why."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.resume import Resume
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, open_session
from onnx import TensorProto
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT, CHOOSE = feeds_of((4, 6, D), 12, seed=11), feeds_of((4, 6, D), 3, seed=12)
REPORT = feeds_of((4, 6, D), 4, seed=13)
SLIM, DISTILL = "slim-ffn:keep=0.25,multiple=1,refine=0,affine=false", "distill-ffn:epochs=20,rate=0.02"


def mean_drift(source, candidate, feeds=REPORT) -> float:
    return float(np.mean([drift(run(source, feed), run(candidate, feed)) for feed in feeds]))


def weights(model: Model) -> dict[str, np.ndarray]:
    return {each.name: each._values.load() for node in model.graph.nodes for each in node.inputs if hasattr(each, "_values")}


@pytest.mark.parametrize("gated", [False, True])
def test_it_comes_nearer_on_inputs_it_never_saw(tmp_path, gated):
    s = transformer(3, D, FF, gated=gated, activation="silu" if gated else "gelu")
    slim, _ = rewrite(s, tmp_path, SLIM, fit=FIT, choose=CHOOSE)
    (tmp_path / "too").mkdir()
    model, [_, result] = rewrite(s, tmp_path / "too", SLIM, DISTILL, fit=FIT, choose=CHOOSE)
    assert result.fired == len(set(weights(model)) - set(weights(Model.load(tmp_path / "before.onnx"))))
    assert result.refused == []
    assert mean_drift(s.model(), model) < 0.85 * mean_drift(s.model(), slim)
    assert "loss on the feeds that choose" in result.notes[0]


def test_only_what_is_new_moves(tmp_path):
    s = transformer(3, D, FF)
    model, [_, result] = rewrite(s, tmp_path, "linearize-ffn:blocks=1,heal=false", DISTILL, fit=FIT, choose=CHOOSE)
    before, after = weights(Model.load(tmp_path / "before.onnx")), weights(model)
    assert result.fired == 2
    assert all(np.array_equal(before[name], after[name]) for name in set(before) & set(after))
    assert len(set(after) - set(before)) == 2


def test_all_linears_and_norms_may_move(tmp_path):
    s = transformer(3, D, FF)
    affine = "linearize-ffn:heal=false"
    new, [_, few] = rewrite(s, tmp_path, affine, DISTILL, fit=FIT, choose=CHOOSE)
    (tmp_path / "all").mkdir()
    model, [_, result] = rewrite(s, tmp_path / "all", affine, f"{DISTILL},weights=all", fit=FIT, choose=CHOOSE)
    assert result.fired == few.fired + 6
    assert mean_drift(s.model(), model) < mean_drift(s.model(), new)


def test_a_table_and_what_is_read_beside_it_stay(tmp_path):
    s = Sketch()
    words = s.weight(s.numbers(300, D, scale=1.0), "words")
    x = s.op("Gather", words, s.input("ids", ["batch", "tokens"], TensorProto.INT64))
    x = s.op("Add", x, s.ffn(s.norm(x, D), D, FF))
    s.op("MatMul", x, s.op("Transpose", words, perm=[1, 0]), out=s.output("logits"))
    random = np.random.default_rng(0)
    fit, choose, report = ([{"ids": random.integers(0, 300, (4, 10))} for _ in range(count)] for count in (12, 3, 3))
    slim, _ = rewrite(s, tmp_path, SLIM, fit=fit, choose=choose)
    (tmp_path / "too").mkdir()
    model, [_, result] = rewrite(s, tmp_path / "too", SLIM, f"{DISTILL},weights=all", fit=fit, choose=choose)
    assert result.fired
    table = np.frombuffer(s.initializers["words"].raw_data, np.float32).reshape(300, D)
    np.testing.assert_array_equal(weights(model)["words"], table)
    assert divergence(s.model(), model, report) < divergence(s.model(), slim, report)


def divergence(source, candidate, feeds) -> float:
    """Mean KL of the logits."""
    found = []
    for feed in feeds:
        p, q = (run(each, feed)["logits"].astype(np.float64) for each in (source, candidate))
        p, q = (each - np.log(np.exp(each).sum(axis=-1, keepdims=True)) for each in (p, q))
        found.append((np.exp(p) * (p - q)).sum(axis=-1).mean())
    return float(np.mean(found))


def test_padding_does_not_count(tmp_path):
    s = transformer(2, D, FF)
    s.input("attention_mask", ["batch", "tokens"], TensorProto.INT64)
    s.op("Identity", "attention_mask", out=s.output("mask", onnx_type=TensorProto.INT64))
    mask = np.repeat([[1, 1, 1, 1, 0, 0]], 4, axis=0)
    clean, dirty = [], []
    for feed in FIT:
        x = feed["x"].copy()
        x[:, 4:] = 0
        clean.append({"x": x, "attention_mask": mask})
        x = x.copy()
        x[:, 4:] = 1e6
        dirty.append({"x": x, "attention_mask": mask})
    plan = "slim-ffn:keep=8,multiple=1,select=magnitude,refit=none,affine=false", "distill-ffn:epochs=3"
    found = []
    for name, feeds in (("clean", clean), ("dirty", dirty)):
        (tmp_path / name).mkdir()
        model, [_, result] = rewrite(s, tmp_path / name, *plan, fit=feeds, choose=feeds[:2])
        assert result.fired
        found.append(weights(model))
    assert all(np.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_the_same_bytes_each_time_and_after_a_break(tmp_path):
    s = transformer(2, D, FF)
    onnx.save_model(s.model(), tmp_path / "m.onnx")
    plan = Plan.parse(["slim-ffn:keep=8,multiple=1,select=magnitude,refit=none,affine=false", "distill-ffn:epochs=4"])
    feeds, choose = Feeds.of(FIT), Feeds.of(CHOOSE)

    class BrokenOffError(Exception):
        pass

    def breaking(message: str) -> None:
        if "epoch 3" in message:
            raise BrokenOffError

    def outcome(name: str, progress=lambda message: None) -> bytes:
        model = Model.load(tmp_path / "m.onnx")
        kept = Resume(tmp_path / name, {"plan": plan.to_yaml()}, [feeds, choose])
        run_plan(model, plan, fit=feeds, choose=choose, threads=1, resume=kept, progress=progress)
        model.save(tmp_path / "out.onnx")
        return (tmp_path / "out.onnx").read_bytes()

    whole = outcome("a")
    with pytest.raises(BrokenOffError):
        outcome("b", breaking)
    seen = []
    assert outcome("b", seen.append) == whole
    assert not any("epoch 1" in message for message in seen)
    assert any("epoch 4" in message for message in seen)


def test_a_file_as_the_teacher(tmp_path):
    s = transformer(2, D, FF)
    rewrite(s, tmp_path, SLIM, fit=FIT, choose=CHOOSE)
    model = Model.load(tmp_path / "after.onnx")
    plan = Plan.parse([f"{DISTILL},teacher={tmp_path / 'before.onnx'}"])
    [result] = run_plan(model, plan, fit=Feeds.of(FIT), choose=Feeds.of(CHOOSE), threads=1)
    assert result.fired
    assert mean_drift(s.model(), model) < 0.85 * mean_drift(s.model(), tmp_path / "after.onnx")


def test_where_no_derivative_leads_to_the_output_what_comes_before_is_compared(tmp_path):
    s = transformer(2, D, FF)
    s.nodes.pop()
    s.outputs.clear()
    s.op("Hardmax", "stream_1", out=s.output("best"))
    model, [_, result] = rewrite(s, tmp_path, SLIM, DISTILL, fit=FIT, choose=CHOOSE)
    assert result.fired
    assert "compared at stream_1" in result.notes[-1]
    assert "Hardmax" in result.notes[-1]
    before = open_session(Model.load(tmp_path / "before.onnx"), outputs=["stream_1"]).run(REPORT[0])["stream_1"]
    after = open_session(model, outputs=["stream_1"]).run(REPORT[0])["stream_1"]
    assert np.linalg.norm(after - before) < 0.6 * np.linalg.norm(before)


def test_it_is_left_where_the_feeds_that_choose_do_not_see_it(tmp_path):
    model, [_, result] = rewrite(transformer(2, D, FF), tmp_path, SLIM, "distill-ffn:epochs=1,rate=0.9", fit=FIT, choose=CHOOSE)
    assert result.fired == 0
    assert "do not see it" in result.refused[0].reason
    assert not any("distilled" in name for name in weights(model))


def reason(tmp_path, s, *plan, feeds=FIT, choose=CHOOSE) -> str:
    _, results = rewrite(s, tmp_path, *plan, fit=feeds, choose=choose)
    [refused] = results[-1].refused
    assert results[-1].fired == 0
    return refused.reason


def test_what_it_refuses(tmp_path):
    assert "name the original with teacher=FILE" in reason(tmp_path, transformer(1), "distill-ffn")
    assert "opset 12" in reason(tmp_path, transformer(1, pre_norm=False, activation="relu", opset=12), SLIM, "distill-ffn")
    assert "is a float32 weight" in reason(tmp_path, transformer(1), SLIM, "to-half", "distill-ffn")


def test_it_refuses_where_nothing_behind_the_weights_can_be_compared(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Hardmax", s.op("Add", x, s.ffn(x, D, FF), out="stream"), out=s.output("y"))
    rewrite(s, tmp_path, SLIM, fit=FIT, choose=CHOOSE)
    other = Sketch()
    other.op("Relu", other.input("x", ["batch", "tokens", D]), out=other.output("y"))
    model = Model.load(tmp_path / "after.onnx")
    plan = Plan.parse([f"distill-ffn:teacher={other.save(tmp_path / 'other.onnx')}"])
    [result] = run_plan(model, plan, fit=Feeds.of(FIT), choose=Feeds.of(CHOOSE), threads=1)
    assert "no derivative leads through Hardmax" in result.refused[0].reason


def test_zeros_of_a_sparse_matrix_stay(tmp_path):
    model, [_, result] = rewrite(transformer(2, D, FF), tmp_path, "sparsify-ffn", DISTILL, fit=FIT, choose=CHOOSE)
    assert result.fired
    sparse = [each for name, each in weights(model).items() if each.ndim == 2 and "distilled" in name]
    assert len(sparse) == 4
    assert all((each == 0).mean() >= 0.5 for each in sparse)


def test_masks_and_tables_are_no_weights(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", 6, D])
    x = s.op("Add", x, s.weight(s.numbers(6, D), "positions"))
    mask = s.weight(-3 * np.triu(np.ones((6, 6), np.float32)), "mask")
    scores = s.op("Add", s.op("MatMul", x, s.op("Transpose", x, perm=[0, 2, 1])), mask)
    x = s.op("Add", x, s.op("MatMul", s.op("Softmax", scores), s.linear(x, D, D)))
    s.op("Add", x, s.ffn(s.norm(x, D), D, FF), out=s.output("y"))
    model, [_, result] = rewrite(s, tmp_path, SLIM, f"{DISTILL},weights=all", fit=FIT, choose=CHOOSE)
    assert result.fired == 8
    assert {"positions", "mask"} <= set(weights(model))


@pytest.mark.parametrize("after", ["rank 0", "other type", "no number in padding"])
def test_outputs_of_other_kinds(tmp_path, after):
    s = transformer(2, D, FF)
    s.nodes.pop()
    s.outputs.clear()
    fit, choose = FIT, CHOOSE
    if after == "rank 0":
        s.op("ReduceMean", s.op("Abs", "stream_1"), keepdims=0, out=s.output("y"))
    elif after == "other type":
        s.op("Cast", "stream_1", to=TensorProto.DOUBLE, out=s.output("y", onnx_type=TensorProto.DOUBLE))
    else:
        mask = s.op("Cast", s.input("attention_mask", ["batch", "tokens"], TensorProto.INT64), to=TensorProto.FLOAT)
        s.op("Add", "stream_1", s.op("Log", s.op("Unsqueeze", mask, s.weight(np.array([2])))), out=s.output("y"))
        kept = {"attention_mask": np.repeat([[1, 1, 1, 1, 0, 0]], 4, axis=0)}
        fit, choose = ([feed | kept for feed in feeds] for feeds in (FIT, CHOOSE))
    _, [_, result] = rewrite(s, tmp_path, SLIM, DISTILL, fit=fit, choose=choose)
    assert result.fired, result.refused


@pytest.mark.parametrize(("options", "said"), [("epochs=0", "epochs=0"), ("rate=0", "rate=0"), ("rate=1.5", "rate=1.5"),
                                               ("weights=some", "weights")])
def test_options_that_make_no_sense(options, said):
    with pytest.raises(InputError, match=said):
        Plan.parse([f"distill-ffn:{options}"])


def test_a_teacher_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        rewrite(transformer(1), tmp_path, "distill-ffn:teacher=nowhere.onnx", fit=FIT, choose=CHOOSE)
