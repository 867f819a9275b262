"""remove-attention: attention goes, the residual path stays, and what else is read stays too."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run
from ffnfold.graph.attention import find_attention
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from layer_graphs import KINDS, D, attention, encoder_decoder, layers, skip_norms
from onnx import TensorProto, helper, numpy_helper
from rewriting import Branch, feeds_of, in_branch, rewrite

[X] = feeds_of((2, 5, D))


def out_projection(number: int) -> str:
    return f"/layer.{number}/attention/out"


def muted(s: Sketch, number: int, constant: np.ndarray | None = None) -> onnx.ModelProto:
    """The model of ``s`` whose attention in layer ``number`` adds zero, or a constant, in front of any norm of its own."""
    model = s.model()
    for node in model.graph.node:
        if node.name.startswith(out_projection(number)):
            bias = node.op_type == "Add"
            name = node.input[1]
            held = next(each for each in model.graph.initializer if each.name == name)
            array = np.zeros_like(numpy_helper.to_array(held))
            if bias and constant is not None:
                array = constant.astype(array.dtype)
            held.CopyFrom(numpy_helper.from_array(array, name))
    return model


def shown(model: onnx.ModelProto, name: str, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The value ``name``, rows of all feeds."""
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return np.concatenate([run(model, feed, [name])[name].reshape(-1, D) for feed in feeds])


@pytest.mark.parametrize("kind", ["pre", "post", "parallel", "parallel-in-turn"])
@pytest.mark.parametrize("number", [0, 1])
def test_the_residual_path_is_left(tmp_path, kind, number):
    s = layers(kind)
    model, [result] = rewrite(s, tmp_path, f"remove-attention:blocks={number},keep=nothing")
    assert (result.fired, result.refused) == (1, [])
    assert ops(model).count("Softmax") == 1
    assert drift(run(muted(s, number), X), run(model, X)) < 1e-6
    assert len(find_ffn_blocks(model)) == 2


@pytest.mark.parametrize("kind", ["sandwich", "branch-norm"])
def test_a_norm_of_the_branch_goes_with_it(tmp_path, kind):
    s = layers(kind, 1)
    model, [result] = rewrite(s, tmp_path, "remove-attention:keep=nothing")
    assert result.fired == 1
    proto = s.model()
    middle = next(node for node in proto.graph.node if "middle_0" in node.output)
    middle.op_type = "Identity"
    del middle.input[1]
    assert drift(run(proto, X), run(model, X)) < 1e-6
    assert not find_attention(model)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_joining_is_found_and_may_go_entirely(tmp_path, kind):
    model, [result] = rewrite(layers(kind, 3), tmp_path, "remove-attention:keep=nothing")
    assert (result.fired, result.refused) == (3, [])
    assert "Softmax" not in ops(model)
    run(model, X)


@pytest.mark.parametrize("kind", ["pre", "post", "parallel"])
def test_the_mean_is_what_the_add_received(tmp_path, kind):
    s, feeds = layers(kind), feeds_of((2, 5, D), 4, seed=11)
    added = next(node.output[0] for node in s.nodes if node.name == f"{out_projection(1)}/Add")
    mean = shown(s.model(), added, feeds).mean(axis=0)
    model, [result] = rewrite(s, tmp_path, "remove-attention:blocks=1", fit=feeds)
    assert result.fired == 1
    assert drift(run(muted(s, 1, mean), X), run(model, X)) < 1e-5


@pytest.mark.parametrize("by", ["cosine", "output"])
@pytest.mark.parametrize("kind", ["pre", "parallel"])
def test_the_one_that_adds_least_goes(tmp_path, kind, by):
    s = layers(kind, 3)
    for node in s.nodes:
        if node.name.startswith(out_projection(1)):
            s.weight(1e-3 * numpy_helper.to_array(s.initializers[node.input[1]]), node.input[1])
    model, [result] = rewrite(s, tmp_path, f"remove-attention:keep=nothing,count=1,by={by}", fit=feeds_of((2, 5, D), 2))
    assert result.fired == 1
    assert drift(run(muted(s, 1), X), run(model, X)) < 1e-6


@pytest.mark.parametrize(("options", "left"), [("count=2", 1), ("fraction=0.34", 2), ("count=9", 0), ("count=0", 3)])
def test_count_and_fraction_say_how_many_go(tmp_path, options, left):
    model, _ = rewrite(layers("pre", 3), tmp_path, f"remove-attention:keep=nothing,{options}", fit=[X])
    assert ops(model).count("Softmax") == left


def test_attention_over_another_stream_stays_unless_asked_for(tmp_path):
    s, feed = encoder_decoder(), {**X, "target": 2 * X["x"][:, :3]}
    model, [result] = rewrite(s, tmp_path, "remove-attention:blocks=1,keep=nothing")
    assert result.fired == 1
    assert drift(run(muted(s, 1), feed), run(model, feed)) < 1e-6
    assert [each.crosses for each in find_attention(model)[0]] == [False, True]
    model, [result] = rewrite(s, tmp_path, "remove-attention:blocks=1,keep=nothing,cross=true")
    assert result.fired == 1
    assert "Softmax" not in ops(model)


def test_attention_over_an_input_only_is_over_another_stream(tmp_path):
    s = Sketch()
    x, memory = s.input("x", ["batch", "tokens", D]), s.input("memory", ["batch", "words", D])
    x = s.op("Add", x, attention(s, x, memory))
    s.op("Add", x, s.ffn(x), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "remove-attention:keep=nothing")
    assert (result.fired, "another stream" in result.refused[0].reason) == (0, True)
    assert "Softmax" in ops(model)


def test_a_cache_goes_in_and_out_as_before(tmp_path):
    s = Sketch()
    x, past = s.input("x", ["batch", "tokens", D]), s.input("past", ["batch", "past_tokens", D])
    normed = s.norm(x, D)
    q, new = s.linear(normed, D, D), s.linear(normed, D, D)
    s.op("Concat", past, new, axis=1, out=s.output("present", ["batch", "all_tokens", D]))
    scores = s.op("Softmax", s.op("MatMul", q, s.op("Transpose", "present", perm=[0, 2, 1])))
    out = s.linear(s.op("MatMul", scores, "present"), D, D, name=out_projection(0))
    x = s.op("Add", x, out)
    s.op("Add", x, s.ffn(s.norm(x, D)), out=s.output("y", ["batch", "tokens", D]))
    feed = {**X, "past": 3 * X["x"][:, :2]}
    for plan, expected in (("remove-attention:keep=nothing", muted(s, 0)), ("remove-layer", None)):
        model, [result] = rewrite(s, tmp_path, plan)
        assert result.fired == 1
        before, after = run(s.model() if expected is None else expected, feed), run(model, feed)
        np.testing.assert_allclose(after["present"], before["present"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after["y"], before["y"] if expected is not None else X["x"], rtol=1e-5, atol=1e-5)
        assert "Softmax" not in ops(model)


def fused(caches: bool) -> Sketch:
    """MultiHeadAttention in front of an FFN."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    normed = s.norm(x, D)
    q, k, v = (s.linear(normed, D, D) for _ in range(3))
    outputs = ["mixed"] + ([s.output(name, ["batch", 2, "tokens", D // 2]) for name in ("key", "value")] if caches else [])
    s.op("MultiHeadAttention", q, k, v, out=outputs, domain="com.microsoft", num_heads=2)
    x = s.op("Add", x, s.linear("mixed", D, D, name=out_projection(0)))
    s.op("Add", x, s.ffn(s.norm(x, D)), out=s.output("y", ["batch", "tokens", D]))
    return s


def test_a_fused_operator_goes(tmp_path):
    s = fused(caches=False)
    model, [result] = rewrite(s, tmp_path, "remove-attention:keep=nothing")
    assert result.fired == 1
    assert drift(run(muted(s, 0), X), run(model, X)) < 1e-6


@pytest.mark.parametrize("plan", ["remove-attention:keep=nothing", "remove-layer"])
def test_a_fused_operator_that_gives_out_the_cache_stays(tmp_path, plan):
    s = fused(caches=True)
    model, [result] = rewrite(s, tmp_path, plan)
    assert result.fired == 0
    assert "MultiHeadAttention also gives out keys and values" in result.refused[0].reason
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


@pytest.mark.parametrize("keep", ["nothing", "mean"])
@pytest.mark.parametrize("post", [True, False])
def test_attention_that_ends_in_a_skip_norm(tmp_path, post, keep):
    s, feeds = skip_norms(post), feeds_of((2, 5, D), 3, seed=11)
    added = next(node.output[0] for node in s.nodes if node.name == f"{out_projection(1)}/Add")
    mean = shown(s.model(), added, feeds).mean(axis=0) if keep == "mean" else None
    model, [result] = rewrite(s, tmp_path, f"remove-attention:blocks=1,keep={keep}", fit=feeds)
    assert result.fired == 1
    assert ops(model).count("Softmax") == 1
    assert drift(run(muted(s, 1, mean), X), run(model, X)) < 1e-5


def test_what_else_reads_the_attention_still_reads_it(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    added = attention(s, s.norm(x, D), name="/layer.0/attention")
    s.op("ReduceMax", added, out=s.output("probe"), keepdims=0)
    x = s.op("Add", x, added)
    s.op("Add", x, s.ffn(s.norm(x, D)), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "remove-attention:keep=nothing")
    assert result.fired == 1
    assert drift({"probe": run(s.model(), X)["probe"]}, {"probe": run(model, X)["probe"]}) < 1e-6
    assert drift({"y": run(muted(s, 0), X)["y"]}, {"y": run(model, X)["y"]}) < 1e-6


def test_weights_that_another_layer_reads_stay(tmp_path):
    s = layers("pre", 1)
    first = list(s.nodes[:-1])
    renamed = {name: f"{name}_again" for node in first for name in node.output} | {"x": "stream_0"}
    last = s.nodes.pop()
    for node in first:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        copy.name = f"/again{node.name}"
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        copy.output[:] = [renamed[name] for name in node.output]
        s.nodes.append(copy)
    last.input[0] = "stream_0_again"
    s.nodes.append(last)
    proto = s.model()
    middle = next(node for node in proto.graph.node if "middle_0" in node.output)
    middle.op_type = "Identity"
    del middle.input[1]
    model, [result] = rewrite(s, tmp_path, "remove-attention:blocks=0,keep=nothing")
    assert result.fired == 1
    assert drift(run(proto, X), run(model, X)) < 1e-6


def test_half_precision(tmp_path):
    s, feeds = layers("pre", 1, dtype=np.float16), feeds_of((2, 5, D), 2, dtype=np.float16)
    model, [result] = rewrite(s, tmp_path, "remove-attention", fit=feeds)
    assert result.fired == 1
    assert run(model, feeds[0])["y"].dtype == np.float16


def in_if() -> Sketch:
    inner = Branch()
    middle = inner.op("Add", "x", attention(inner, "x"))
    return in_branch(inner, inner.op("Add", middle, inner.ffn(middle)), ["batch", "tokens", D])


def test_attention_inside_an_if_goes_but_has_no_mean(tmp_path):
    feed = {**X, "wanted": np.asarray(True)}
    model, [result] = rewrite(in_if(), tmp_path, "remove-attention:keep=nothing")
    assert result.fired == 1
    assert drift(run(in_if().model(), feed), run(model, feed)) > 1e-3
    model, [result] = rewrite(in_if(), tmp_path, "remove-attention", fit=[feed])
    assert result.fired == 0
    assert "subgraph main/" in result.refused[0].reason


@pytest.mark.parametrize("plan", ["remove-attention:keep=nothing", "remove-layer"])
def test_a_residual_that_is_repeated_for_the_batch_stays(tmp_path, plan):
    s = Sketch()
    x, start = s.input("x", ["batch", "tokens", D]), s.input("start", [1, 5, D])
    mixed = s.op("MatMul", s.op("Softmax", s.op("MatMul", s.linear(start, D, D), s.op("Transpose", x, perm=[0, 2, 1]))),
                 s.op("Add", x, start))
    s.op("Add", start, s.linear(mixed, D, D), out=s.info("sum", [2, 5, D]))
    s.op("Add", "sum", s.ffn("sum"), out=s.output("y", [2, 5, D]))
    feed = {**X, "start": X["x"][:1]}
    model, [result] = rewrite(s, tmp_path, plan)
    assert (result.fired, "another shape" in result.refused[0].reason) == (0, True)
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


def test_no_attention_no_removal(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    router = s.op("Softmax", s.linear(x, D, D))  # mixes no tokens
    x = s.op("Add", x, s.op("Mul", router, s.linear(x, D, D)))
    s.op("Add", x, s.ffn(x), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "remove-attention:keep=nothing")
    assert result.fired == 0
    assert [(each.block, each.reason) for each in result.refused] == [(0, "there is no attention in front of it")]
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_attention_behind_a_block_that_is_gone_is_left(tmp_path):
    s = layers("pre", 2)
    model, [_, result] = rewrite(s, tmp_path, "remove-ffn:blocks=0,keep=nothing", "remove-attention:keep=nothing")
    assert result.fired == 1
    assert ops(model).count("Softmax") == 1
    assert "its FFN block is gone" in {each.reason for each in result.refused}


def gated_and_written_out() -> Sketch:
    """A gate behind the mixing, and a softmax in single operators."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    x = s.op("Add", x, attention(s, s.norm(x, D), gated=True, name="/layer.0/attention"))
    softmax = next(node for node in s.nodes if node.op_type == "Softmax")
    at = s.nodes.index(softmax)
    s.nodes[at:at + 1] = [helper.make_node("Exp", softmax.input, ["e"]), helper.make_node("ReduceSum", ["e", "axes"], ["t"]),
                          helper.make_node("Div", ["e", "t"], softmax.output)]
    s.weight(np.asarray([-1]), "axes")
    s.op("Add", x, s.ffn(s.norm(x, D)), out=s.output("y"))
    return s


def test_a_gate_and_a_softmax_written_out(tmp_path):
    s = gated_and_written_out()
    model, [result] = rewrite(s, tmp_path, "remove-attention:keep=nothing")
    assert result.fired == 1
    assert drift(run(muted(s, 0), X), run(model, X)) < 1e-6
    assert "Exp" not in ops(model)


def test_without_feeds_there_is_no_mean_and_no_score(tmp_path):
    for options in ("keep=mean", "keep=nothing,count=1"):
        with pytest.raises(InputError, match="needs real inputs"):
            rewrite(layers("pre"), tmp_path, f"remove-attention:{options}")


@pytest.mark.parametrize(("options", "said"), [("count=1,fraction=0.5", "count or fraction"), ("count=-1", "negative"),
                                               ("fraction=1.5", "between 0 and 1")])
def test_options_that_make_no_sense(tmp_path, options, said):
    for name in ("remove-attention", "remove-layer"):
        with pytest.raises(InputError, match=said):
            rewrite(layers("pre", 1), tmp_path, f"{name}:{options}")
