"""fuse-attention: one operator gives what the written-out attention gave, and what it cannot give is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, optimized_ops, run
from ffnfold.graph.attention import find_attention
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from headed_attention import HEADS, WIDTH, D, Heads
from onnx import TensorProto
from rewriting import rewrite

INT = TensorProto.INT64


def feed(batch: int = 2, tokens: int = 5, **others: Any) -> dict[str, Any]:
    return {"x": np.random.default_rng(0).normal(size=(batch, tokens, D)).astype(np.float32), **others}


def check(s: Sketch, folder: Any, feeds: list[dict[str, Any]] | None = None, fit: Any = None) -> Model:
    model, [result] = rewrite(s, folder, "fuse-attention", fit=fit)
    assert (result.fired, result.refused, result.exact) == (1, [], True)
    found = ops(model)
    assert (found.count("MultiHeadAttention"), found.count("Softmax"), found.count("Transpose")) == (1, 0, 0)
    for each in feeds or [feed(), feed(1, 3)]:
        assert drift(run(s.model(), each), run(model, each)) < 1e-5
    return model


def mul_both(s: Heads, q: str, k: str) -> str:
    root = s.number(WIDTH ** -0.25)
    return s.op("MatMul", s.op("Mul", q, root), s.op("Mul", root, k))


def unscaled(s: Heads, q: str, k: str) -> str:
    return s.op("MatMul", q, k)


def divided(s: Heads, q: str, k: str) -> str:
    return s.op("Div", s.op("MatMul", q, k), s.number(1.7))


def fused(s: Heads, q: str, k: str) -> str:
    return s.op("FusedMatMul", q, k, domain="com.microsoft", alpha=0.3)


SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "scale on both": {"scores": mul_both}, "no scale": {"scores": unscaled}, "divided": {"scores": divided},
    "fused": {"scores": fused}, "heads said": {"target": "heads"}, "width said": {"target": "width"},
    "shapes computed": {"target": "shape", "last": "shape"}, "other width of values": {"value_width": 6}}


@pytest.mark.parametrize("how", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_spellings(tmp_path, how, opset):
    check(Heads(opset, **how).build(), tmp_path)


def test_keys_that_are_turned_twice(tmp_path):
    class Twice(Heads):
        def key(self) -> str:
            return self.heads(self.linear(self.x, D, D), [0, 2, 1, 3], [0, 1, 3, 2])

    check(Twice().build(), tmp_path)


def test_keys_that_the_product_turns(tmp_path):
    class Fused(Heads):
        def key(self) -> str:
            return self.heads(self.linear(self.x, D, D), [0, 2, 1, 3])

    turned = Fused(scores=lambda s, q, k: s.op("FusedMatMul", q, k, domain="com.microsoft", alpha=0.5, transB=1)).build()
    check(turned, tmp_path)


MASKS = {"of all": (2, 1, 5, 5), "of each head": (1, HEADS, 5, 5), "of keys": (2, 1, 1, 5), "causal": (5, 5),
         "three": (HEADS, 5, 5), "of keys alone": (5,)}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("mask_first", [False, True])
def test_masks_that_are_added(tmp_path, shape, mask_first):
    def masked(s: Heads, q: str, k: str) -> str:
        pair = [s.scaled(q, k), s.input("mask", [None] * len(shape))]
        return s.op("Add", *(reversed(pair) if mask_first else pair))

    mask = np.where(np.random.default_rng(1).random(shape) < 0.3, -1e4, 0).astype(np.float32)
    given = feed(mask=mask)
    check(Heads(scores=masked).build(), tmp_path, [given], fit=[given])


def test_a_mask_that_is_a_constant(tmp_path):
    causal = np.where(np.tri(5) > 0, 0, -1e4).astype(np.float32)
    s = Heads(scores=lambda s, q, k: s.op("Add", s.scaled(q, k), s.weight(causal))).build()
    check(s, tmp_path, [feed()], fit=[feed()])


def test_layers_with_one_mask(tmp_path):
    s = Heads(scores=lambda s, q, k: s.op("Add", s.scaled(q, k), "mask"))
    s.input("mask", ["batch", 1, 1, "tokens"])
    s.build()
    s.outputs.clear()
    s.nodes[-1].output[0] = s.x = s.memory = "between"
    s.build()
    given = feed(mask=np.zeros((2, 1, 1, 5), np.float32))
    model, [result] = rewrite(s, tmp_path, "fuse-attention", fit=[given])
    assert result.fired == 2
    assert drift(run(s.model(), given), run(model, given)) < 1e-5


def test_attention_over_another_stream(tmp_path):
    class Cross(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.memory = self.input("memory", ["batch", "others", D])

    memory = np.random.default_rng(2).normal(size=(2, 7, D)).astype(np.float32)
    check(Cross().build(), tmp_path, [feed(memory=memory)])


def test_around_integers_and_without_padding(tmp_path):
    s = Heads().build()
    integers = Model.load(s.save(tmp_path / "model.onnx"))
    run_plan(integers, Plan.parse(["quantize-ffn:also=attention,row_scale=true"]), threads=1)
    model = integers.copy()
    [result] = run_plan(model, Plan.parse(["fuse-attention"]), threads=1)
    assert result.fired == 1
    assert drift(run(integers, feed()), run(model, feed())) < 1e-4


def test_what_was_fused_is_still_attention(tmp_path):
    model = check(Heads().build(), tmp_path)
    [found], _ = find_attention(model)
    assert found.core.op == "MultiHeadAttention"
    [result] = run_plan(model, Plan.parse(["remove-attention:keep=nothing"]), threads=1)
    assert result.fired == 1


def refusal(s: Sketch, folder: Any, fit: Any = None) -> str:
    model, [result] = rewrite(s, folder, "fuse-attention", fit=fit)
    assert result.fired == 0
    assert sorted(ops(model)) == sorted(ops(s.model()))
    return "; ".join(each.reason for each in result.refused)


def shown(name: str) -> Callable[[Heads, str, str], str]:
    def scores(s: Heads, q: str, k: str) -> str:
        found = s.scaled(q, k)
        s.op("Identity", found, out=s.output(name, None))
        return found
    return scores


def test_scores_that_are_read_elsewhere(tmp_path):
    assert "its products are read elsewhere" in refusal(Heads(scores=shown("scores")).build(), tmp_path)


def test_probabilities_that_are_read_elsewhere(tmp_path):
    s = Heads().build()
    s.op("Identity", next(node.output[0] for node in s.nodes if node.op_type == "Softmax"), out=s.output("weights", None))
    assert "its probabilities are read elsewhere" in refusal(s, tmp_path)


def test_a_shape_that_is_read_elsewhere(tmp_path):
    s = Heads().build()
    joined = [node for node in s.nodes if node.op_type == "Transpose"][-1].output[0]
    s.op("Shape", joined, out=s.output("shape", [4], INT))
    assert "its shape is read elsewhere" in refusal(s, tmp_path)


def test_positions_between_the_heads_and_the_product(tmp_path):
    class Rotary(Heads):
        def query(self) -> str:
            return self.op("Neg", super().query())

    assert "rotary positions" in refusal(Rotary().build(), tmp_path)


def test_scaled_values(tmp_path):
    class Scaled(Heads):
        def value(self) -> str:
            return self.op("Mul", super().value(), self.number(2))

    assert "its values are scaled" in refusal(Scaled().build(), tmp_path)


def test_a_scale_that_the_caller_may_override(tmp_path):
    def given(s: Heads, q: str, k: str) -> str:
        return s.op("Mul", s.op("MatMul", q, k), s.weight(np.asarray(0.5, np.float32), s.input("scale", [])))

    s = Heads(scores=given).build()
    assert "no product, scaled, and a mask" in refusal(s, tmp_path, [feed()])


def spelled_norm(s: Sketch, x: str) -> str:
    centered = s.op("Sub", x, s.op("ReduceMean", x, axes=[-1]))
    square = s.op("ReduceMean", s.op("Pow", centered, s.number(2)), axes=[-1])
    normed = s.op("Div", centered, s.op("Sqrt", s.op("Add", square, s.number(1e-5))))
    return s.op("Add", s.op("Mul", normed, s.weight(s.numbers(D, scale=1.0))), s.weight(s.numbers(D)))


def test_attention_that_onnx_runtime_fuses_by_itself(tmp_path):
    s = Sketch(12)
    x, mask = s.input("x", ["batch", "tokens", D]), s.input("mask", ["batch", "tokens"], INT)
    wide = s.op("Cast", s.op("Unsqueeze", s.op("Unsqueeze", mask, axes=[1]), axes=[2]), to=TensorProto.FLOAT)
    closed = s.op("Mul", s.op("Sub", s.number(1), wide), s.number(-10000))
    x = spelled_norm(s, x)
    split = [s.op("Reshape", s.linear(x, D, D), s.weight(np.asarray([0, 0, HEADS, WIDTH], np.int64))) for _ in range(3)]
    turned = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    q, k, v = (s.op("Transpose", each, perm=perm) for each, perm in zip(split, turned, strict=True))
    scores = s.op("Add", s.op("Div", s.op("MatMul", q, k), s.number(WIDTH ** 0.5)), closed)
    mixed = s.op("Transpose", s.op("MatMul", s.op("Softmax", scores, axis=3), v), perm=[0, 2, 1, 3])
    rows = s.linear(s.op("Reshape", mixed, s.weight(np.asarray([0, 0, D], np.int64))), D, D)
    s.op("Identity", spelled_norm(s, s.op("Add", rows, x)), out=s.output("y", None))
    assert "Attention" in optimized_ops(s.save(tmp_path / "given.onnx"), tmp_path)
    assert "it fuses this attention by itself" in refusal(s, tmp_path, [feed(mask=np.ones((2, 5), np.int64))])


def test_queries_that_are_the_same_for_all_texts(tmp_path):
    class Learned(Heads):
        def query(self) -> str:
            return self.heads(self.linear(self.weight(self.numbers(1, 3, D)), D, D), [0, 2, 1, 3])

        def build(self) -> Heads:
            self.x, self.memory = self.weight(self.numbers(1, 3, D)), self.x
            return super().build()

    assert "are not of one batch" in refusal(Learned().build(), tmp_path, [feed(1)])


def test_heads_that_a_batch_of_one_hides(tmp_path):
    class Wrong(Heads):
        def heads(self, y: str, *perm: list[int], width: int = WIDTH) -> str:
            return self.op("Transpose", self.op("Reshape", y, self.ints(1, -1, HEADS, width)), perm=perm[0])

    assert "is no [batch, tokens, heads · d]" in refusal(Wrong(last="input").build(), tmp_path, [feed(1)])


def test_a_mask_that_one_token_hides(tmp_path):
    s = Heads(scores=lambda s, q, k: s.op("Add", s.scaled(q, k), s.weight(np.zeros(1, np.float32)))).build()
    assert "its mask is [1]" in refusal(s, tmp_path, [feed(2, 1)])


def test_a_mask_with_a_default(tmp_path):
    def masked(s: Heads, q: str, k: str) -> str:
        return s.op("Add", s.scaled(q, k), s.weight(np.zeros((1, 1, 1, 7), np.float32), s.input("bias", [1, 1, 1, "tokens"])))

    assert "its shapes are not known" in refusal(Heads(scores=masked).build(), tmp_path)


def test_a_mask_by_where(tmp_path):
    def chosen(s: Heads, q: str, k: str) -> str:
        return s.op("Where", s.weight(np.tri(5) > 0), s.scaled(q, k), s.number(-1e4))

    assert "no product, scaled, and a mask" in refusal(Heads(scores=chosen).build(), tmp_path, [feed()])


def test_a_scale_behind_the_mask_is_no_scale_of_the_product(tmp_path):
    def late(s: Heads, q: str, k: str) -> str:
        mask = s.weight(np.where(np.tri(5) > 0, 0, -3).astype(np.float32))
        return s.op("Mul", s.op("Add", s.op("MatMul", q, k), mask), s.number(0.5))

    assert "no product, scaled, and a mask" in refusal(Heads(scores=late).build(), tmp_path, [feed()])


def test_flattened_rows(tmp_path):
    class Flat(Heads):
        def heads(self, y: str, *perm: list[int], width: int = WIDTH) -> str:
            size = self.op("Slice", self.op("Shape", self.x), self.ints(0), self.ints(2))
            shape = self.op("Concat", size, self.ints(HEADS), self.ints(width), axis=0)
            y = self.op("Reshape", self.op("Reshape", y, self.ints(-1, D)), shape)
            return self.op("Transpose", y, perm=perm[0])

    assert "is no [batch, tokens, heads · d]" in refusal(Flat().build(), tmp_path)


def test_a_type_without_a_kernel(tmp_path):
    assert refusal(Heads(dtype=np.float64).build(), tmp_path).startswith("it could not be tried")


def test_a_classifier_is_no_attention(tmp_path):
    s = Sketch()
    s.op("Softmax", s.linear(s.input("x", ["batch", "tokens", D]), D, 5), out=s.output("y", None), axis=-1)
    assert refusal(s, tmp_path) == ""
