"""remove-ffn: what is left of a block that is taken out, and which blocks go."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from onnx import helper, numpy_helper
from rewriting import Branch, feeds_of, in_branch, rewrite

D = 8
[X] = feeds_of((2, 5, D))


def with_branch(model: onnx.ModelProto, stream: str, value: np.ndarray | None) -> onnx.ModelProto:
    """``model``, the Add that makes ``stream`` reading ``value`` (nothing for None) in the place of its second operand."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    node = next(node for node in changed.graph.node if stream in node.output)
    assert node.op_type == "Add"
    if value is None:
        node.op_type = "Identity"
        del node.input[1]
    else:
        changed.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), "in_place"))
        node.input[1] = "in_place"
    return changed


def branch_of(model: onnx.ModelProto, stream: str, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    """What the Add that makes ``stream`` receives as its second operand: rows of all feeds."""
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    name = next(node.input[1] for node in shown.graph.node if stream in node.output)
    shown.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return np.concatenate([run(shown, feed, [name])[name].reshape(-1, D) for feed in feeds])


def names(model: Model) -> list[str]:
    return [block.name for block in find_ffn_blocks(model)]


@pytest.mark.parametrize("kind", [{}, {"gated": True, "activation": "silu"}, {"pre_norm": False}, {"bias": False}])
def test_nothing_is_left_but_the_residual_path(tmp_path, kind):
    s = transformer(3, **kind)
    model, [result] = rewrite(s, tmp_path, "remove-ffn:blocks=1,keep=nothing")
    assert (result.fired, result.refused) == (1, [])
    assert names(model) == ["/layer.0/ffn", "/layer.2/ffn"]
    assert drift(run(with_branch(s.model(), "stream_1", None), X), run(model, X)) < 1e-6
    assert (tmp_path / "after.onnx").stat().st_size < (tmp_path / "before.onnx").stat().st_size


def test_without_its_only_block_a_model_is_the_identity(tmp_path):
    model, _ = rewrite(transformer(1), tmp_path, "remove-ffn:keep=nothing")
    np.testing.assert_array_equal(run(model, X)["y"], X["x"])
    assert not model.graph.constants


def test_the_mean_is_what_the_add_received_on_average(tmp_path):
    s, feeds = transformer(3), feeds_of((2, 5, D), 4, seed=11)
    model, [result] = rewrite(s, tmp_path, "remove-ffn:blocks=1", fit=feeds)
    assert result.fired == 1
    mean = branch_of(s.model(), "stream_1", feeds).mean(axis=0, dtype=np.float64)
    assert drift(run(with_branch(s.model(), "stream_1", mean), X), run(model, X)) < 1e-6


def test_each_mean_is_measured_behind_the_blocks_already_removed(tmp_path):
    s, feeds = transformer(2), feeds_of((2, 5, D), 4, seed=11)
    model, _ = rewrite(s, tmp_path, "remove-ffn", fit=feeds)
    first = with_branch(s.model(), "stream_0", branch_of(s.model(), "stream_0", feeds).mean(axis=0, dtype=np.float64))
    on_prefix, on_original = (branch_of(source, "stream_1", feeds).mean(axis=0) for source in (first, s.model()))
    assert np.abs(on_prefix - on_original).max() > 1e-3
    total = run(model, X)["y"] - X["x"]
    np.testing.assert_allclose(total, np.broadcast_to(branch_of(s.model(), "stream_0", feeds).mean(axis=0) + on_prefix,
                                                      total.shape), atol=1e-5)


def test_padding_is_not_in_the_mean(tmp_path):
    s = transformer(1)
    s.input("attention_mask", ["batch", "tokens"], onnx.TensorProto.INT64)
    mask = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    feeds = feeds_of((2, 5, D), 3, seed=11, attention_mask=mask)
    for feed in feeds:
        feed["x"][mask == 0] = 50 * np.arange(D)
    model, _ = rewrite(s, tmp_path, "remove-ffn", fit=feeds)
    rows = branch_of(s.model(), "stream_0", feeds).reshape(3, 2, 5, D)[:, mask == 1]
    left = run(model, {**X, "attention_mask": mask})["y"] - X["x"]
    np.testing.assert_allclose(left, np.broadcast_to(rows.reshape(-1, D).mean(axis=0), left.shape), atol=1e-5)


@pytest.mark.parametrize(("options", "left"), [("count=1", 3), ("count=0", 4), ("fraction=0.5", 2), ("fraction=0.3", 3),
                                               ("fraction=1", 0), ("count=99", 0), ("blocks=0-1,count=1", 3)])
def test_count_and_fraction_say_how_many_go(tmp_path, options, left):
    model, _ = rewrite(transformer(4), tmp_path, f"remove-ffn:keep=nothing,{options}", fit=feeds_of((2, 5, D), 2))
    assert len(find_ffn_blocks(model)) == left


@pytest.mark.parametrize("by", ["cosine", "output"])
def test_the_block_that_adds_least_goes(tmp_path, by):
    s = transformer(3)
    down = next(node for node in s.nodes if node.name == "/layer.1/ffn/down/MatMul").input[1]
    bias = next(node for node in s.nodes if node.name == "/layer.1/ffn/down/Add").input[1]
    for name in (down, bias):
        s.weight(1e-3 * numpy_helper.to_array(s.initializers[name]), name)
    model, _ = rewrite(s, tmp_path, f"remove-ffn:keep=nothing,count=1,by={by}", fit=feeds_of((2, 5, D), 2))
    assert names(model) == ["/layer.0/ffn", "/layer.2/ffn"]


def half_read() -> Sketch:
    """Block 0 writes much, into features that the head does not read; block 1 writes little, into those that it reads."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    for number, (size, features) in enumerate(((3.0, slice(4, 8)), (0.3, slice(0, 4)))):
        up, down = s.numbers(D, 32), np.zeros((32, D), np.float32)
        up[4:] = 0
        down[:, features] = size * s.numbers(32, 4)
        hidden = s.op("Relu", s.op("MatMul", x, s.weight(up), name=f"/layer.{number}/up"))
        x = s.op("Add", x, s.op("MatMul", hidden, s.weight(down), name=f"/layer.{number}/down"))
    head = s.numbers(D, 3)
    head[4:] = 0
    s.op("MatMul", x, s.weight(head), out=s.output("y"))
    return s


@pytest.mark.parametrize(("by", "left"), [("cosine", "/layer.0"), ("output", "/layer.1")])
def test_the_score_by_output_knows_what_is_read(tmp_path, by, left):
    model, _ = rewrite(half_read(), tmp_path, f"remove-ffn:keep=nothing,count=1,by={by}", fit=feeds_of((2, 5, D), 2))
    assert names(model) == [left]


def test_blocks_are_chosen_on_the_feeds_for_choosing(tmp_path):
    """On ``fit`` block 0 writes nothing (its ReLUs are closed), on ``choose`` block 1."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    for number, sign in enumerate((1.0, -1.0)):
        up = sign * np.abs(s.numbers(D, 32))
        hidden = s.op("Relu", s.op("MatMul", x, s.weight(up), name=f"/layer.{number}/up"))
        x = s.op("Add", x, s.op("MatMul", hidden, s.weight(s.numbers(32, D, scale=1e-3)), name=f"/layer.{number}/down"))
    s.op("Identity", x, out=s.output("y"))
    positive = [{"x": np.abs(feed["x"]) + 1} for feed in feeds_of((2, 5, D), 2)]
    negative = [{"x": -feed["x"]} for feed in positive]
    model, _ = rewrite(s, tmp_path, "remove-ffn:keep=nothing,count=1", fit=negative, choose=positive)
    assert names(model) == ["/layer.0"]


def test_what_lies_between_the_block_and_the_add_goes_with_it(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    branch = s.op("Mul", s.norm(s.ffn(x), D), s.weight(s.numbers(D)))
    s.op("Add", x, branch, out=s.output("y"))
    feeds = feeds_of((2, 5, D), 3, seed=11)
    plain = s.model()
    mean = branch_of(plain, "y", feeds).mean(axis=0)
    model, _ = rewrite(s, tmp_path, "remove-ffn", fit=feeds)
    assert ops(model) == ["Add"]
    np.testing.assert_allclose(run(model, X)["y"], X["x"] + mean, atol=1e-5)
    model, _ = rewrite(s, tmp_path, "remove-ffn:keep=nothing")
    assert ops(model) == ["Identity"]


def beside_attention() -> tuple[Sketch, str, str]:
    """x + (attention + ffn), as parallel blocks are written; returns the names of both branches."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    attention = s.op("MatMul", s.op("Softmax", s.op("MatMul", x, s.op("Transpose", x, perm=[0, 2, 1]))), x)
    ffn = s.ffn(x)
    s.op("Add", x, s.op("Add", s.linear(attention, D, D), ffn), out=s.output("y"))
    return s, s.nodes[-2].input[0], ffn


@pytest.mark.parametrize("keep", ["nothing", "mean"])
def test_a_branch_that_carries_more_than_the_block_stays(tmp_path, keep):
    s, attention, ffn = beside_attention()
    shown = s.model()
    shown.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (attention, ffn))
    before = run(shown, X)
    model, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep}", fit=[X])
    assert result.fired == 1
    expected = X["x"] + before[attention] + (before[ffn].reshape(-1, D).mean(axis=0) if keep == "mean" else 0)
    np.testing.assert_allclose(run(model, X)["y"], expected, atol=1e-5)


@pytest.mark.parametrize("keep", ["nothing", "mean"])
def test_a_block_whose_output_is_an_output_leaves_zeros_or_its_mean(tmp_path, keep):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    branch = s.ffn(x)
    s.output(branch, ["batch", "tokens", D])
    s.op("Add", x, branch, out=s.output("y"))
    before = run(s.model(), X)
    model, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep}", fit=[X])
    after = run(model, X)
    assert result.fired == 1
    assert [info.name for info in model.graph.outputs] == [branch, "y"]
    left = before[branch].reshape(-1, D).mean(axis=0) if keep == "mean" else np.zeros(D)
    np.testing.assert_allclose(after[branch], np.broadcast_to(left, after[branch].shape), atol=1e-5)
    np.testing.assert_allclose(after["y"], X["x"] + after[branch], atol=1e-6)


def test_another_reader_of_the_block_reads_zeros(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    branch = s.ffn(x)
    s.op("ReduceMax", branch, out=s.output("probe"), keepdims=0)
    s.op("Add", x, branch, out=s.output("y"))
    model, _ = rewrite(s, tmp_path, "remove-ffn:keep=nothing")
    after = run(model, X)
    assert after["probe"] == 0
    np.testing.assert_array_equal(after["y"], X["x"])


def test_weights_that_another_block_reads_stay(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up, down = s.weight(s.numbers(D, 32)), s.weight(s.numbers(32, D))
    for number in range(2):
        x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, up)), down), out=f"stream_{number}")
    s.op("Identity", x, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "remove-ffn:blocks=0,keep=nothing")
    assert result.fired == 1
    assert drift(run(with_branch(s.model(), "stream_0", None), X), run(model, X)) < 1e-6


@pytest.mark.parametrize("keep", ["nothing", "mean"])
def test_a_block_that_ends_in_a_skip_norm(tmp_path, keep):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    ffn = s.ffn(x, activation="gelu")
    s.op("SkipLayerNormalization", x, ffn, s.weight(1 + s.numbers(D, scale=0.1)), s.weight(s.numbers(D)),
         domain="com.microsoft", epsilon=1e-5, out=s.output("y"))
    shown = s.model()
    shown.graph.output.append(helper.make_tensor_value_info(ffn, onnx.TensorProto.FLOAT, None))
    mean = run(shown, X)[ffn].reshape(-1, D).mean(axis=0)
    reference = s.model()
    reference.graph.initializer.append(numpy_helper.from_array(
        np.broadcast_to(mean if keep == "mean" else np.zeros(D), X["x"].shape).astype(np.float32), "left"))
    reference.graph.node[-1].input[1] = "left"
    model, [result] = rewrite(s, tmp_path, f"remove-ffn:keep={keep}", fit=[X])
    assert result.fired == 1
    assert drift(run(reference, X), run(model, X)) < 1e-5


def test_half_precision(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x), out=s.output("y"))
    feeds = feeds_of((2, 5, D), 2, dtype=np.float16)
    model, [result] = rewrite(s, tmp_path, "remove-ffn", fit=feeds)
    assert result.fired == 1
    after = run(model, feeds[0])["y"]
    assert after.dtype == np.float16
    assert np.ptp((after - feeds[0]["x"]).reshape(-1, D), axis=0).max() < 0.01


def in_if() -> Sketch:
    inner = Branch()
    return in_branch(inner, inner.op("Add", "x", inner.ffn("x")), ["batch", "tokens", D])


def test_a_block_inside_an_if_goes(tmp_path):
    model, [result] = rewrite(in_if(), tmp_path, "remove-ffn:keep=nothing")
    assert result.fired == 1
    for wanted in (True, False):
        np.testing.assert_array_equal(run(model, {**X, "wanted": np.asarray(wanted)})["y"], X["x"])


def test_a_block_inside_an_if_has_no_mean(tmp_path):
    s = in_if()
    feed = {**X, "wanted": np.asarray(True)}
    model, [result] = rewrite(s, tmp_path, "remove-ffn", fit=[feed])
    assert result.fired == 0
    assert "subgraph main/" in result.refused[0].reason
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


def test_without_feeds_there_is_no_mean_and_no_score(tmp_path):
    for options in ("keep=mean", "keep=nothing,count=1", "keep=nothing,fraction=0.5"):
        with pytest.raises(InputError, match="needs real inputs"):
            rewrite(transformer(2), tmp_path, f"remove-ffn:{options}")


@pytest.mark.parametrize(("options", "said"), [
    ("count=1,fraction=0.5", "count or fraction"), ("count=-1", "negative"), ("fraction=1.5", "between 0 and 1"),
    ("keep=median", "choose one of nothing, mean"), ("by=luck", "choose one of cosine, output"), ("count=two", "not a number")])
def test_options_that_make_no_sense(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        rewrite(transformer(1), tmp_path, f"remove-ffn:{options}")
