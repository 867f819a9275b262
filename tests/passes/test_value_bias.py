"""fold-bias on attention: which biases of V go through the softmax into the output projection, and which must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, optimized_ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan

D, HEADS, SIZE = 8, 2, 4
X = {"x": np.random.default_rng(9).normal(size=(2, 5, D)).astype(np.float32)}


class Attention:
    """softmax(Q Kᵀ) V W_o + b_o, with every part open to be spoilt."""

    def __init__(self, dtype: type = np.float32, opset: int = 17) -> None:
        self.s = Sketch(opset, dtype=dtype)
        self.x = self.s.input("x", ["batch", "tokens", D])
        self.memory = self.x
        self.cut: list[str] | None = None  # sizes for a Reshape, as names; None: written as constants
        self.joined: list[str] | None = None
        self.weights: Callable[[str], str] = lambda weights: weights
        self.value: Callable[[str], str] = lambda value: value
        self.out_bias = True
        self.value_width = D

    def sizes(self, value: str, last: list[int]) -> str:
        """[batch, tokens, *last] for a Reshape, computed from the shape of ``value``."""
        s = self.s
        shape = s.op("Shape", value)
        parts = [s.op("Unsqueeze", s.op("Gather", shape, s.weight(np.asarray(i))), s.weight(np.asarray([0]))) for i in (0, 1)]
        return s.op("Concat", *parts, *(s.weight(np.asarray([n])) for n in last), axis=0)

    def heads(self, y: str, sizes: str | None = None, keys: bool = False) -> str:
        s = self.s
        cut = s.op("Reshape", y, sizes or s.weight(np.asarray([0, 0, HEADS, SIZE])))
        return s.op("Transpose", cut, perm=[0, 2, 3, 1] if keys else [0, 2, 1, 3])

    def build(self, sizes: str | None = None, joined: str | None = None, residual: bool = False) -> Sketch:
        s = self.s
        query = self.heads(s.linear(self.x, D, D), sizes)
        key = self.heads(s.linear(self.memory, D, D), sizes, keys=True)
        value = self.heads(self.value(s.linear(self.memory, D, D, name="/value")), sizes)
        weights = self.weights(s.op("Softmax", s.op("MatMul", query, key), axis=-1))
        mixed = s.op("Transpose", s.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        mixed = s.op("Reshape", mixed, joined or s.weight(np.asarray([0, 0, D])))
        y = s.linear(mixed, D, D, bias=self.out_bias)
        s.op("Add" if residual else "Identity", y, *([self.x] if residual else []), out=s.output("y"))
        return s


def fold(s: Sketch, folder: Path) -> tuple[Model, PassResult]:
    s.save(folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse(["fold-bias"]), threads=1)
    model.save(folder / "folded.onnx")
    return Model.load(folder / "folded.onnx"), result


def has_bias(model: Model) -> bool:
    return "/value/Add" in [node.name for node in model.graph.nodes]


def check(s: Sketch, folder: Path, fires: bool, feed: dict | None = None) -> PassResult:
    model, result = fold(s, folder)
    assert has_bias(model) is not fires
    assert drift(run(s.model(), feed or X), run(model, feed or X)) < 2e-6
    if fires:
        counts = [len(optimized_ops(folder / f"{name}.onnx", folder)) for name in ("model", "folded")]
        assert counts[1] < counts[0]
        assert (folder / "folded.onnx").stat().st_size < (folder / "model.onnx").stat().st_size
    return result


def test_heads_cut_by_constants(tmp_path):
    assert check(Attention().build(), tmp_path, True).fired == 1


def test_one_head_that_is_never_cut(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    query, key, value = (s.linear(x, D, D, name=name) for name in ("", "", "/value"))
    weights = s.op("Softmax", s.op("MatMul", query, s.op("Transpose", key, perm=[0, 2, 1])), axis=-1)
    s.op("Identity", s.linear(s.op("MatMul", weights, value), D, D), out=s.output("y"))
    check(s, tmp_path, True)


def test_heads_cut_by_sizes_that_are_computed(tmp_path):
    a = Attention()
    sizes = a.sizes("x", [HEADS, SIZE])
    check(a.build(sizes, a.sizes("x", [D])), tmp_path, True)


def test_the_number_of_heads_left_to_be_inferred(tmp_path):
    a = Attention()
    check(a.build(a.sizes("x", [-1, SIZE]), a.sizes("x", [-1])), tmp_path, True)


def test_sizes_taken_from_the_value_itself(tmp_path):
    a = Attention()
    joined = a.sizes("x", [D])
    sizes: list[str] = []
    a.value = lambda value: sizes.append(a.sizes(value, [HEADS, SIZE])) or value
    a.build(None, joined)
    reshape = next(node for node in a.s.nodes if node.op_type == "Reshape" and node.input[0].startswith("Add")
                   and any(other.name == "/value/Add" and other.output[0] == node.input[0] for other in a.s.nodes))
    reshape.input[1] = sizes[0]
    check(a.s, tmp_path, True)


def test_keys_and_values_repeated_for_groups_of_queries(tmp_path):
    s = Sketch()
    x = s.input("x", [2, 5, D])
    query = s.op("Transpose", s.op("Reshape", s.linear(x, D, 16), s.weight(np.asarray([0, 0, 4, SIZE]))), perm=[0, 2, 1, 3])

    def repeated(y: str) -> str:
        cut = s.op("Transpose", s.op("Reshape", y, s.weight(np.asarray([0, 0, 2, SIZE]))), perm=[0, 2, 1, 3])
        apart = s.op("Unsqueeze", s.info(cut, [2, 2, 5, SIZE]), s.weight(np.asarray([2])))
        spread = s.op("Expand", apart, s.weight(np.asarray([2, 2, 2, 5, SIZE])))
        joined = s.op("Reshape", s.info(spread, [2, 2, 2, 5, SIZE]), s.weight(np.asarray([2, 4, 5, SIZE])))
        return s.info(joined, [2, 4, 5, SIZE])

    key, value = repeated(s.linear(x, D, D)), repeated(s.linear(x, D, D, name="/value"))
    scores = s.op("MatMul", query, s.op("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = s.op("Transpose", s.op("MatMul", s.op("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    s.op("Identity", s.linear(s.op("Reshape", mixed, s.weight(np.asarray([0, 0, 16]))), 16, D), out=s.output("y"))
    check(s, tmp_path, True)


def test_cross_attention_to_a_known_number_of_keys(tmp_path):
    a = Attention()
    a.memory = a.s.input("memory", ["batch", 3, D])
    s = a.build()
    value = next(node.input[1] for node in s.nodes if node.op_type == "MatMul" and node.input[0].startswith("Softmax"))
    feed = {**X, "memory": X["x"][:, :3]}
    check(s, tmp_path, False, feed)  # nothing says how many keys there are
    s.info(value, ["batch", HEADS, 3, SIZE])
    check(s, tmp_path, True, feed)


def test_cross_attention_to_no_keys_at_all(tmp_path):
    a = Attention()
    a.memory = a.s.input("memory", ["batch", "keys", D])
    result = check(a.build(), tmp_path, False, {**X, "memory": X["x"][:, :0]})
    assert "a key to every query" in result.refused[0].reason


def test_a_row_without_a_key_is_not_a_number_before_and_after(tmp_path):
    a = Attention()
    mask = a.s.input("mask", ["batch", 1, "tokens", "tokens"])
    a.weights = lambda weights: weights
    s = a.build()
    scores = next(node for node in s.nodes if node.op_type == "Softmax")
    masked = s.op("Add", scores.input[0], mask)
    s.nodes.insert(s.nodes.index(scores), s.nodes.pop())
    scores.input[0] = masked
    empty = np.zeros((2, 1, 5, 5), np.float32)
    empty[0, 0, 3] = -np.inf
    model, result = fold(s, tmp_path)
    assert result.fired == 1
    before, after = run(s.model(), {**X, "mask": empty})["y"], run(model, {**X, "mask": empty})["y"]
    assert np.isnan(before[0, 3]).all()
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spoil", ["Where", "Mul"])
def test_weights_that_may_not_sum_to_one(tmp_path, spoil):
    a = Attention()
    s = a.s
    if spoil == "Where":  # as PyTorch has it: a row without a key is 0
        a.weights = lambda weights: s.op("Where", s.op("IsNaN", weights), s.number(0), weights)
    else:
        a.weights = lambda weights: s.op("Mul", weights, s.number(0.5))
    result = check(a.build(), tmp_path, False)
    assert "may not sum to 1" in result.refused[0].reason


def test_a_softmax_over_the_queries(tmp_path):
    a = Attention()
    s = a.build()
    softmax = next(node for node in s.nodes if node.op_type == "Softmax")
    softmax.attribute[0].i = 2
    result = check(s, tmp_path, False)
    assert "over the keys" in result.refused[0].reason


@pytest.mark.parametrize("told", [True, False])
def test_a_softmax_over_the_last_of_four_axes(tmp_path, told):
    """axis=3 is over the keys where there are four axes; a mask may have more."""
    a = Attention()
    s = a.build()
    softmax = next(node for node in s.nodes if node.op_type == "Softmax")
    softmax.attribute[0].i = 3
    feed = dict(X)
    if not told:
        mask = s.input("mask", None)
        s.nodes.insert(s.nodes.index(softmax), onnx.helper.make_node("Add", [softmax.input[0], mask], ["masked"]))
        softmax.input[0] = "masked"
        feed["mask"] = np.zeros((1, 1, 1, 1), np.float32)
    check(s, tmp_path, told, feed)


def test_a_value_that_is_kept_for_the_next_token(tmp_path):
    a = Attention()
    s = a.build()
    value = next(node.input[1] for node in s.nodes if node.op_type == "MatMul" and node.input[0].startswith("Softmax"))
    s.output(value)
    check(s, tmp_path, False)


def test_a_value_that_something_else_reads(tmp_path):
    a = Attention()
    a.value = lambda value: (a.s.op("ReduceMax", value, out=a.s.output("top"), axes=[-1]), value)[1]
    check(a.build(), tmp_path, False)


def test_an_output_projection_without_a_bias(tmp_path):
    a = Attention()
    a.out_bias = False
    result = check(a.build(), tmp_path, False)
    assert "has no bias" in result.refused[0].reason


def test_sixteen_bits(tmp_path):
    a = Attention(np.float16)
    s = a.build()
    model, result = fold(s, tmp_path)
    assert result.fired == 0
    assert has_bias(model)


def test_features_that_are_mixed_with_tokens(tmp_path):
    """[batch, tokens, 8] cut to [batch, 2·tokens, -1, 4]: the inferred number is 1, and V's bias differs from row to row."""
    a = Attention()
    s = a.s
    tokens = s.op("Gather", s.op("Shape", "x"), s.weight(np.asarray([1])))
    twice = s.op("Mul", tokens, s.weight(np.asarray([2])))
    batch = s.op("Gather", s.op("Shape", "x"), s.weight(np.asarray([0])))
    sizes = s.op("Concat", batch, twice, s.weight(np.asarray([-1])), s.weight(np.asarray([SIZE])), axis=0)
    check(a.build(sizes, a.sizes("x", [D])), tmp_path, False)


def test_a_bias_that_the_caller_may_override(tmp_path):
    a = Attention()
    s = a.build()
    for place in ("value", "out"):
        add = next(node for node in s.nodes if node.name == "/value/Add") if place == "value" else s.nodes[-2]
        name = next(name for name in add.input if name in s.initializers)
        s.input(name, [D])
        model, result = fold(s, tmp_path)
        assert result.fired == 0
        feed = {**X, name: np.full(D, 0.5, np.float32)}
        assert drift(run(s.model(), feed), run(model, feed)) < 2e-6
        s.inputs.pop()


def test_a_large_bias(tmp_path):
    a = Attention()
    s = a.build()
    add = next(node for node in s.nodes if node.name == "/value/Add")
    name = next(name for name in add.input if name in s.initializers)
    s.initializers[name] = onnx.numpy_helper.from_array(np.full(D, 1e6, np.float32), name)
    result = check(s, tmp_path, False)
    assert "so large" in result.refused[0].reason


def test_biases_that_are_shared_stay_where_the_file_would_grow(tmp_path):
    a = Attention()
    s = a.build()
    adds = [node for node in s.nodes if node.op_type == "Add"]
    name = next(name for name in adds[0].input if name in s.initializers)
    for add in adds:
        place = next(i for i, each in enumerate(add.input) if each in s.initializers)
        if add.input[place] != name:
            del s.initializers[add.input[place]]
            add.input[place] = name
    result = check(s, tmp_path, False)
    assert "grow" in result.refused[0].reason


def test_a_model_too_large_to_be_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("ffnfold.passes.exact.fusions._LARGEST", 100)
    a = Attention()
    a.x = a.s.op("MatMul", a.x, a.s.weight(a.s.numbers(D, 64)))
    a.x = a.memory = a.s.op("MatMul", a.x, a.s.weight(a.s.numbers(64, D)))
    result = check(a.build(), tmp_path, False)
    assert "would have to load" in result.refused[0].reason


def test_an_attention_that_onnx_runtime_fuses_whole_stays(tmp_path):
    s = Sketch(12)
    x, mask = s.input("x", ["batch", "tokens", D]), s.input("mask", ["batch", "tokens"], onnx.TensorProto.INT64)
    s.opset = 12

    def norm(value: str) -> str:
        centred = s.op("Sub", value, s.op("ReduceMean", value, axes=[-1]))
        root = s.op("Sqrt", s.op("Add", s.op("ReduceMean", s.op("Pow", centred, s.number(2)), axes=[-1]), s.number(1e-12)))
        return s.op("Add", s.op("Mul", s.op("Div", centred, root), s.weight(1 + s.numbers(D, scale=0.1))), s.weight(s.numbers(D)))

    first = norm(x)
    hidden = s.op("Cast", s.op("Unsqueeze", s.op("Unsqueeze", mask, axes=[1]), axes=[2]), to=onnx.TensorProto.FLOAT)
    bias = s.op("Mul", s.op("Sub", s.number(1), hidden), s.number(-10000))
    cut = s.weight(np.asarray([0, 0, HEADS, SIZE]))
    query, key, value = (s.op("Transpose", s.op("Reshape", s.linear(first, D, D, name=name), cut), perm=perm) for name, perm in
                         (("", [0, 2, 1, 3]), ("", [0, 2, 3, 1]), ("/value", [0, 2, 1, 3])))
    scores = s.op("Add", s.op("Div", s.op("MatMul", query, key), s.number(2)), bias)
    mixed = s.op("Transpose", s.op("MatMul", s.op("Softmax", scores, axis=3), value), perm=[0, 2, 1, 3])
    joined = s.linear(s.op("Reshape", mixed, s.weight(np.asarray([0, 0, D]))), D, D)
    s.op("Identity", norm(s.op("Add", joined, first)), out=s.output("y"))
    for name, shape in ((node.output[0], ["batch", HEADS, "tokens", "tokens"]) for node in s.nodes if node.op_type == "Softmax"):
        s.info(name, shape)
    scored = next(node.input[0] for node in s.nodes if node.op_type == "Softmax")
    s.info(scored, ["batch", HEADS, "tokens", "tokens"])
    assert "Attention" in optimized_ops(s.save(tmp_path / "before.onnx"), tmp_path)
    feed = {**X, "mask": np.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    result = check(s, tmp_path, False, feed)
    assert any("lose a fusion" in refused.reason for refused in result.refused)
    assert "Softmax" in ops(Model.load(tmp_path / "folded.onnx"))
