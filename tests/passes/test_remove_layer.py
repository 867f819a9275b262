"""remove-layer: what goes into a layer comes out of it."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, run
from ffnfold.graph.ffn import find_ffn_blocks
from layer_graphs import KINDS, D, attention, encoder_decoder, layer, layers, skip_norms
from onnx import numpy_helper
from rewriting import Branch, feeds_of, in_branch, rewrite

[X] = feeds_of((2, 5, D))


def without(kind: str, number: int, count: int) -> Sketch:
    """The sketch of ``layers(kind, count)`` drawn without one layer, the others with the weights they have there."""
    whole, s = layers(kind, count), Sketch()
    x = s.input("x", ["batch", "tokens", D])
    for each in range(count):
        before = len(s.nodes)
        after = layer(s, x, kind, each)
        if each == number:
            del s.nodes[before:]
        else:
            x = after
    s.op("Identity", x, out=s.output("y", ["batch", "tokens", D]))
    assert all((numpy_helper.to_array(whole.initializers[name]) == numpy_helper.to_array(held)).all()
               for name, held in s.initializers.items())
    return s


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_layer_is_as_if_it_had_never_been(tmp_path, kind, number):
    model, [result] = rewrite(layers(kind, 3), tmp_path, f"remove-layer:blocks={number}")
    assert (result.fired, result.refused) == (1, [])
    assert drift(run(without(kind, number, 3).model(), X), run(model, X)) < 1e-6
    assert len(find_ffn_blocks(model)) == 2
    assert len(ops(model)) == len(without(kind, number, 3).nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_without_layers_a_model_is_the_identity(tmp_path, kind):
    model, [result] = rewrite(layers(kind, 2), tmp_path, "remove-layer")
    assert result.fired == 2
    np.testing.assert_array_equal(run(model, X)["y"], X["x"])


@pytest.mark.parametrize("by", ["cosine", "output"])
def test_the_layer_that_does_least_goes(tmp_path, by):
    s = layers("pre", 3)
    for node in s.nodes:
        if node.name.startswith(("/layer.1/attention/out", "/layer.1/ffn/down")):
            s.weight(1e-3 * numpy_helper.to_array(s.initializers[node.input[1]]), node.input[1])
    model, [result] = rewrite(s, tmp_path, f"remove-layer:count=1,by={by}", fit=feeds_of((2, 5, D), 2))
    assert result.fired == 1
    assert [block.name for block in find_ffn_blocks(model)] == ["/layer.0/ffn", "/layer.2/ffn"]


def test_attention_over_another_stream_goes_with_its_layer(tmp_path):
    feed = {**X, "target": 2 * X["x"][:, :3]}
    model, [result] = rewrite(encoder_decoder(), tmp_path, "remove-layer:blocks=1")
    assert result.fired == 1
    np.testing.assert_array_equal(run(model, feed)["y"], feed["target"])


@pytest.mark.parametrize("post", [True, False])
def test_layers_that_end_in_skip_norms(tmp_path, post):
    s = skip_norms(post)
    model, [result] = rewrite(s, tmp_path, "remove-layer:blocks=0")
    assert result.fired == 1
    proto = s.model()
    skips = [node for node in proto.graph.node if node.op_type == "SkipLayerNormalization"]
    if post:  # the second layer reads x
        for node in proto.graph.node:
            node.input[:] = ["x" if name == skips[1].output[0] else name for name in node.input]
    else:  # both branches of the first layer are zero
        ends = ("/layer.0/attention/out", "/layer.0/ffn/down")
        first = {node.input[1] for node in proto.graph.node if node.name.startswith(ends)}
        for held in proto.graph.initializer:
            if held.name in first:
                held.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(held)), held.name))
    assert drift(run(proto, X), run(model, X)) < 1e-5


def test_all_experts_of_a_layer_go_together(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    x = s.op("Add", x, attention(s, s.norm(x, D)))
    normed = s.norm(x, D)
    gates = [s.op("Sigmoid", s.linear(normed, D, 1)) for _ in range(2)]
    experts = [s.op("Mul", s.ffn(normed, name=f"/expert.{number}"), gate) for number, gate in enumerate(gates)]
    s.op("Add", x, s.op("Add", *experts), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "remove-layer")
    assert result.fired == 1
    assert [each.reason for each in result.refused] == ["there is no attention in front of it"]
    np.testing.assert_array_equal(run(model, X)["y"], X["x"])


def test_later_passes_say_that_it_is_gone(tmp_path):
    _, [_, result] = rewrite(layers("pre", 2), tmp_path, "remove-layer:blocks=1", "remove-ffn:keep=nothing")
    assert result.fired == 1
    assert [each.reason for each in result.refused] == ["removed by remove-layer earlier in the plan"]


def test_half_precision(tmp_path):
    feed = feeds_of((2, 5, D), dtype=np.float16)[0]
    model, [result] = rewrite(layers("post", 1, dtype=np.float16), tmp_path, "remove-layer")
    assert result.fired == 1
    np.testing.assert_array_equal(run(model, feed)["y"], feed["x"])


def test_a_layer_inside_an_if(tmp_path):
    inner = Branch()
    s = in_branch(inner, layer(inner, "x", "pre", 0), ["batch", "tokens", D])
    feed = {**X, "wanted": np.asarray(True)}
    model, [result] = rewrite(s, tmp_path, "remove-layer")
    assert result.fired == 1
    np.testing.assert_array_equal(run(model, feed)["y"], X["x"])
    model, [result] = rewrite(s, tmp_path, "remove-layer:count=0", fit=[feed])
    assert "subgraph main/" in result.refused[0].reason


def test_a_block_without_attention_stays(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "remove-layer")
    assert (result.fired, result.refused[0].reason) == (0, "there is no attention in front of it")
    assert drift(run(s.model(), X), run(model, X)) < 1e-6
