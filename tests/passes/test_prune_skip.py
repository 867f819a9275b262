"""prune-skip: a residual folded into an affine map, and a narrow block fitted to the whole sum."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from layer_graphs import skip_norms
from onnx import helper
from rewriting import Branch, feeds_of, in_branch, rewrite

D = 8
[X] = feeds_of((2, 5, D))
FEEDS = feeds_of((2, 30, D), 10, seed=11)


def affine_block(dtype: type = np.float32, bias: bool = True) -> Sketch:
    s = Sketch(dtype=dtype)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.linear(x, D, D, bias=bias), out=s.output("y", ["batch", "tokens", D]))
    return s


@pytest.mark.parametrize("bias", [True, False])
def test_an_affine_block_takes_its_residual_in(tmp_path, bias):
    s = affine_block(bias=bias)
    model, [result] = rewrite(s, tmp_path, "prune-skip")
    assert (result.fired, result.refused) == (1, [])
    assert ops(model) == (["MatMul", "Add"] if bias else ["MatMul"])
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_on_either_side_of_the_add_and_in_a_gemm(tmp_path):
    s = Sketch()
    x = s.input("x", ["tokens", D])
    x = s.op("Add", s.op("Gemm", x, s.weight(s.numbers(D, D)), s.weight(s.numbers(D)), transB=1, alpha=0.5), x)
    s.op("Add", s.linear(x, D, D), x, out=s.output("y", ["tokens", D]))
    feed = {"x": X["x"][0]}
    model, [result] = rewrite(s, tmp_path, "prune-skip")
    assert result.fired == 2
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


def test_after_linearize_in_a_post_norm_model(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    for number in range(2):
        x = s.norm(s.op("Add", x, s.ffn(x, name=f"/layer.{number}/ffn")), D)
    s.op("Identity", x, out=s.output("y"))
    plan = ["linearize-ffn:fit=neuron", "fuse-matmul"]
    before, _ = rewrite(s, tmp_path, *plan, fit=FEEDS)
    after, [*_, result] = rewrite(s, tmp_path, *plan, "prune-skip", fit=FEEDS)
    assert result.fired == 2
    assert ops(after).count("Add") == ops(before).count("Add") - 2
    assert drift(run(before, X), run(after, X)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_the_sum_inside_a_skip_norm(tmp_path, kind, bias):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    more = [s.weight(s.numbers(D))] * (kind == "SkipLayerNormalization") + [s.weight(s.numbers(D))] * bias
    s.op(kind, x, s.linear(x, D, D), s.weight(1 + s.numbers(D, scale=0.1)), *more, domain="com.microsoft", epsilon=1e-5,
         out=["y", "", "", "total"])
    s.output("y"), s.output("total")
    model, [result] = rewrite(s, tmp_path, "prune-skip")
    assert result.fired == 1
    assert drift(run(s.model(), X), run(model, X)) < 1e-5


def test_channels_first(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", D, 4, 4])
    y = s.op("Conv", x, s.weight(s.numbers(D, D, 1, 1)), s.weight(s.numbers(D)))
    s.op("Add", x, y, out=s.output("y"))
    [feed] = feeds_of((2, D, 4, 4))
    model, [result] = rewrite(s, tmp_path, "prune-skip")
    assert (result.fired, ops(model)) == (1, ["Conv"])
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-5


def test_half_precision(tmp_path):
    s = affine_block(np.float16)
    [feed] = feeds_of((2, 5, D), dtype=np.float16)
    model, [result] = rewrite(s, tmp_path, "prune-skip")
    assert result.fired == 1
    assert drift(run(s.model(), feed), run(model, feed)) < 2e-3


def test_inside_an_if(tmp_path):
    inner = Branch()
    s = in_branch(inner, inner.op("Add", "x", inner.linear("x", D, D)), ["batch", "tokens", D])
    feed = {**X, "wanted": np.asarray(True)}
    model, [result] = rewrite(s, tmp_path, "prune-skip")
    assert result.fired == 1
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


def pre_norm() -> Sketch:
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.linear(s.norm(x, D), D, D), out=s.output("y"))
    return s


def shared() -> Sketch:
    s = Sketch()
    x, weight = s.input("x", ["batch", "tokens", D]), s.weight(s.numbers(D, D))
    x = s.op("Add", x, s.op("MatMul", x, weight))
    s.op("MatMul", x, weight, out=s.output("y"))
    return s


def read_twice() -> Sketch:
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    y = s.linear(x, D, D)
    s.op("Add", x, y, out=s.output("y"))
    s.op("ReduceMax", y, out=s.output("probe"), keepdims=0)
    return s


def overridable() -> Sketch:
    s = affine_block(bias=False)
    s.input(next(iter(s.initializers)), [D, D])
    return s


@pytest.mark.parametrize(("draw", "said"), [
    (pre_norm, "a norm of the residual"), (shared, "shared"), (read_twice, "something else reads"), (overridable, "override")])
def test_what_stays(tmp_path, draw, said):
    model, [result] = rewrite(draw(), tmp_path, "prune-skip")
    assert result.fired == 0
    assert said in result.refused[0].reason
    assert drift(run(draw().model(), X), run(model, X)) < 1e-6


def test_what_is_no_residual_stays(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    other = s.op("Relu", x)
    s.op("Add", other, s.linear(x, D, D), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "prune-skip")
    assert (result.fired, result.refused) == (0, [])
    assert ops(model) == ops(s.model())


@pytest.mark.parametrize("kind", [{"activation": "gelu"}, {"gated": True, "activation": "silu"}])
def test_a_fit_to_the_sum_in_a_post_norm_model_loses_nothing(tmp_path, kind):
    """x A + h V with A = I and V as it was is the sum."""
    s = transformer(2, pre_norm=False, **kind)
    model, [result] = rewrite(s, tmp_path, "prune-skip:fit=slim", fit=FEEDS)
    assert (result.fired, result.refused) == (2, [])
    assert drift(run(s.model(), X), run(model, X)) < 1e-2


def test_fewer_neurons_lose_something_and_the_residual_is_gone(tmp_path):
    s = transformer(2, pre_norm=False, activation="gelu")
    model, [result] = rewrite(s, tmp_path, "prune-skip:fit=slim,keep=0.5", fit=FEEDS)
    assert result.fired == 2
    assert 1e-3 < drift(run(s.model(), X), run(model, X)) < 0.2
    readers = [node for node in model.graph.nodes if node.op == "Add" and any(value.name == "x" for value in node.inputs)]
    assert not readers


def test_without_an_affine_map_the_neurons_carry_the_stream(tmp_path):
    s = transformer(1, pre_norm=False, activation="gelu", d_ff=64)
    lost = {}
    for affine in ("true", "false"):
        model, [result] = rewrite(s, tmp_path, f"prune-skip:fit=slim,affine={affine}", fit=FEEDS)
        assert result.fired == 1
        lost[affine] = drift(run(s.model(), X), run(model, X))
    assert lost["true"] < lost["false"] < 0.3


def test_the_sum_in_front_of_a_fused_norm(tmp_path):
    s = skip_norms(post=True)
    model, [result] = rewrite(s, tmp_path, "prune-skip:fit=slim", fit=FEEDS)
    assert (result.fired, [each.reason for each in result.refused]) == (2, [])
    assert drift(run(s.model(), X), run(model, X)) < 0.02
    assert ops(model).count("SkipLayerNormalization") == 2


def test_a_norm_of_the_branch_is_refused(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.norm(s.ffn(x), D), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "prune-skip:fit=slim", fit=FEEDS)
    assert result.fired == 0
    assert "has a norm or a scale" in result.refused[0].reason
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_a_branch_that_carries_attention_too_is_refused(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    normed = s.norm(x, D)
    other = s.op("MatMul", s.op("Softmax", s.op("MatMul", normed, s.op("Transpose", normed, perm=[0, 2, 1]))), normed)
    s.op("Add", x, s.op("Add", s.ffn(normed), other), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "prune-skip:fit=slim", fit=FEEDS)
    assert result.fired == 0
    assert "carries something else too" in result.refused[0].reason
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_later_passes_are_told(tmp_path):
    s = transformer(1, pre_norm=False, activation="gelu")
    _, [_, result] = rewrite(s, tmp_path, "prune-skip:fit=slim", "remove-ffn:keep=nothing", fit=FEEDS)
    assert [each.reason for each in result.refused] == ["left without a residual by prune-skip earlier in the plan"]


def test_an_add_of_another_domain_is_none(tmp_path):
    s = affine_block()
    proto = s.model()
    proto.graph.node[-1].domain = "elsewhere"
    proto.opset_import.append(helper.make_opsetid("elsewhere", 1))
    proto.functions.append(helper.make_function("elsewhere", "Add", ["a", "b"], ["c"], [
        onnx.helper.make_node("Sub", ["a", "b"], ["c"])], [helper.make_opsetid("", 17)]))
    model, [result] = rewrite(proto, tmp_path, "prune-skip")
    assert result.fired == 0
    assert drift(run(proto, X), run(model, X)) < 1e-6


@pytest.mark.parametrize(("options", "said"), [("keep=0", "above 0"), ("keep=2", "above 0"), ("fit=slim,vary=-1", "fewer")])
def test_options_that_make_no_sense(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        rewrite(affine_block(), tmp_path, f"prune-skip:{options}")
