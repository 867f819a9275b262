"""What lies between a block and the residual Add: which of the three, λ, and blocks that make good what is wrong through it."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.branch import Branch, branch_of
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((8, 16, D), 20, seed=11)
[X] = feeds_of((4, 9, D))
SCALE = np.array([-2, -1, -0.5, 0.25, 0.5, 1, 2, 3], np.float32)


def layer_scale(s: Sketch, y: str, out: str | None = None) -> str:
    return s.op("Mul", s.weight(SCALE.astype(s.dtype)), y, out=out)


def layer_norm(s: Sketch, y: str, out: str | None = None) -> str:
    return s.op("LayerNormalization", y, s.weight(SCALE.astype(s.dtype)), s.weight(s.numbers(D)), axis=-1, epsilon=1e-5, out=out)


def rms_norm(s: Sketch, y: str, out: str | None = None) -> str:
    mean = s.op("ReduceMean", s.op("Pow", y, s.number(2)), axes=[-1], keepdims=1)
    size = s.op("Sqrt", s.op("Add", mean, s.number(1e-6)))
    return s.op("Mul", s.op("Div", y, size), s.weight(SCALE.astype(s.dtype)), out=out)


BETWEEN = {"scale": layer_scale, "layer": layer_norm, "rms": rms_norm}


def one_block(kind: str, dtype: type = np.float32) -> Sketch:
    s = Sketch(dtype=dtype)
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, BETWEEN[kind](s, s.ffn(s.norm(x, D), D, FF, activation="gelu")), out=s.output("y"))
    return s


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", BETWEEN)
def test_the_kind_and_the_scale_are_read_off_however_it_is_spelled(tmp_path, kind, dtype):
    model = Model.load(one_block(kind, dtype).save(tmp_path / "m.onnx"))
    [block] = find_ffn_blocks(model)
    branch = branch_of(model, block)
    assert branch is not None
    assert branch.kind == kind
    np.testing.assert_allclose(branch.scale, SCALE, rtol=1e-4 if dtype is np.float32 else 2e-2)


@pytest.mark.parametrize("shape", [[2, 5, D], ["rows", D], [None, None, None, D], None])
@pytest.mark.parametrize("kind", BETWEEN)
def test_whatever_shape_the_graph_declares(tmp_path, kind, shape):
    s = Sketch()
    x = s.input("x", shape or ["batch", "tokens", D])
    y = s.ffn(s.norm(x, D), D, FF, activation="gelu", name="ffn")
    s.op("Add", x, BETWEEN[kind](s, y), out=s.output("y", shape))
    if shape:
        s.info(y, shape)
    model = Model.load(s.save(tmp_path / "m.onnx"))
    [block] = find_ffn_blocks(model)
    branch = branch_of(model, block)
    assert branch is not None
    assert branch.kind == kind


def test_tokens_in_another_order_are_none(tmp_path):
    """The residual is [tokens, batch], the block [batch, tokens]: their rows do not belong together."""
    s = Sketch()
    x = s.input("x", ["tokens", "batch", D])
    y = layer_scale(s, s.ffn(s.op("Transpose", x, perm=[1, 0, 2]), D, FF, activation="gelu"))
    s.op("Add", x, s.op("Transpose", y, perm=[1, 0, 2]), out=s.output("y"))
    model = Model.load(s.save(tmp_path / "m.onnx"))
    for block in find_ffn_blocks(model):
        assert branch_of(model, block) is None


def test_channels_that_a_scale_takes_out_make_nothing_good(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    scale = SCALE * (np.arange(D) > 1)
    s.op("Add", x, s.op("Mul", s.ffn(x, D, FF, activation="gelu"), s.weight(scale)), out=s.output("y"))
    model = Model.load(s.save(tmp_path / "m.onnx"))
    branch = branch_of(model, find_ffn_blocks(model)[0])
    assert branch is not None
    np.testing.assert_array_equal(branch.part, [0, 0, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(branch.towards(np.zeros((1, D)), np.ones((1, D)))[0, :2], 0)


def test_nothing_between_is_none(tmp_path):
    model = Model.load(transformer(1).save(tmp_path / "m.onnx"))
    [block] = find_ffn_blocks(model)
    assert branch_of(model, block) is None


def test_what_is_none_of_the_three_is_none(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    y = s.ffn(x, D, FF, activation="gelu")
    norm = s.op("Div", y, s.op("Sqrt", s.op("ReduceMean", s.op("Abs", y), axes=[-1], keepdims=1)))
    s.op("Add", x, norm, out=s.output("y"))
    model = Model.load(s.save(tmp_path / "m.onnx"))
    [block] = find_ffn_blocks(model)
    assert branch_of(model, block) is None


@pytest.mark.parametrize("kind", BETWEEN)
def test_the_branch_moves_as_asked(kind):
    """To first order; behind a norm, but for what would change the length (and the mean) alone, which it cannot give."""
    random = np.random.default_rng(0)
    scale = SCALE.astype(np.float64)
    y, missing = random.standard_normal((5, D)), 1e-5 * random.standard_normal((5, D))

    def gives(value):
        if kind == "layer":
            value = value - value.mean(axis=1, keepdims=True)
        size = 1 if kind == "scale" else np.sqrt((value ** 2).mean(axis=1, keepdims=True))
        return scale * value / size

    moved = gives(Branch(kind, scale, np.ones(D)).towards(y, missing)) - gives(y)
    steps = np.stack([gives(y + 1e-5 * np.eye(D)[i]) - gives(y) for i in range(D)], axis=1)  # what it can give
    for token in range(5):
        reached = moved[token] / scale
        possible = (steps[token] / scale).T @ np.linalg.lstsq((steps[token] / scale).T, missing[token] / scale, rcond=1e-3)[0]
        np.testing.assert_allclose(reached, possible, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", BETWEEN)
def test_a_norm_makes_good_less_where_it_would_take_more(tmp_path, kind):
    model = Model.load(one_block(kind).save(tmp_path / "m.onnx"))
    branch = branch_of(model, find_ffn_blocks(model)[0])
    assert branch is not None
    square = SCALE.astype(np.float64) ** 2
    expected = np.ones(D) if kind == "scale" else square / (square + 0.01 * square.mean())
    np.testing.assert_allclose(branch.part, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", BETWEEN)
def test_a_block_makes_good_what_the_blocks_before_it_did(tmp_path, kind):
    """Block 1 has the neurons of block 0 once more: towards the original stream it does what block 0 can no longer do."""
    s = Sketch()
    x = stream = s.input("x", ["batch", "tokens", D])
    up, bias, down = s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF)), s.weight(s.numbers(FF, D))
    for _ in range(2):
        hidden = s.activation("gelu", s.op("Add", s.op("MatMul", s.op("Add", x, s.op("Mul", stream, s.number(1e-4))), up), bias))
        stream = s.op("Add", stream, BETWEEN[kind](s, s.op("MatMul", hidden, down)))
    s.op("Identity", stream, out=s.output("y"))
    before, errors = run(s.model(), X), {}
    for target in ("stream", "block"):
        plan = f"slim-ffn:keep=14,multiple=1,affine=false,refine=0,target={target}"
        model, [result] = rewrite(s, tmp_path, plan, fit=FIT)
        assert result.fired == 2
        errors[target] = drift(before, run(model, X))
    assert errors["stream"] < 0.9 * errors["block"]
