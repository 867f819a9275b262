"""Models for the tests on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ffn_graphs import Sketch
from layer_graphs import attention
from onnx import TensorProto

D_MODEL, D_FF = 64, 128


def everything(dtype: Any = np.float32) -> Sketch:
    """x ``[batch, tokens, 64]`` → y: three FFN blocks 64→128, and in them something to do for every pass.

    Attention before the second block, an Identity, a weight behind Transpose, constants added twice behind all blocks but the
    first, norms with scale and shift, two equal weights, a gate beside its up projection (in block 1), neurons that reach
    nothing, and two matrices in a row behind the last block.
    """
    s = Sketch(19, dtype=dtype)
    x = s.input("x", ["batch", "tokens", D_MODEL])
    up = s.numbers(D_MODEL, D_FF)
    for number in range(3):
        if number == 1:
            x = s.op("Add", x, attention(s, s.norm(x, D_MODEL), d_model=D_MODEL))
        normed = s.op("Identity", s.norm(x, D_MODEL))
        turned = s.op("Transpose", s.weight(s.numbers(D_FF, D_MODEL)), perm=[1, 0])
        first = s.op("MatMul", normed, turned if number == 2 else s.weight(up.copy()))
        if number == 1:
            hidden = s.op("Mul", s.activation("silu", first), s.linear(normed, D_MODEL, D_FF, bias=False))
        else:
            hidden = s.activation("gelu", s.op("Add", first, s.weight(s.numbers(D_FF, scale=0.3))))
        down = s.numbers(D_FF, D_MODEL)
        down[::4] = 0
        branch = s.op("Add", s.op("MatMul", hidden, s.weight(down)), s.weight(s.numbers(D_MODEL, scale=0.3)))
        if number:
            branch = s.op("Add", branch, s.weight(s.numbers(D_MODEL, scale=0.3)))
        x = s.op("Add", x, branch)
    y = s.op("MatMul", s.op("MatMul", x, s.weight(s.numbers(D_MODEL, D_MODEL))), s.weight(s.numbers(D_MODEL, D_MODEL)))
    s.op("Identity", y, out=s.output("y", ["batch", "tokens", D_MODEL]))
    return s


def with_shape_arithmetic(dtype: Any = np.float32) -> Sketch:
    """x ``[batch, tokens, 64]`` → y, the first half of the tokens: how many these are is computed in the graph."""
    s = Sketch(19, dtype=dtype)
    x = s.input("x", ["batch", "tokens", D_MODEL])
    tokens = s.op("Gather", s.op("Shape", x), s.weight(np.asarray([1])), axis=0)
    half = s.op("Div", s.op("Add", tokens, s.weight(np.asarray([1]))), s.weight(np.asarray([2])))
    hidden = s.op("Relu", s.linear(x, D_MODEL, D_MODEL))
    kept = s.op("Slice", hidden, s.weight(np.asarray([0])), half, s.weight(np.asarray([1])))
    s.op("Neg", kept, out=s.output("y", ["batch", None, D_MODEL]))
    return s


def reshaped() -> Sketch:
    """x ``[n, 64]`` reshaped to what the input ``shape`` says, and doubled."""
    s = Sketch(19)
    y = s.op("Reshape", s.input("x", ["n", D_MODEL]), s.input("shape", [2], TensorProto.INT64))
    s.op("Add", y, y, out=s.output("y", [None, None]))
    return s


def branching() -> Sketch:
    """An If around the linear: no CUDA graph can be made of it."""
    s, then, other = Sketch(19), Sketch(19, seed=1), Sketch(19, seed=2)
    s.input("x", ["n", D_MODEL])
    for inner in (then, other):
        inner.op("MatMul", "x", inner.weight(inner.numbers(D_MODEL, D_MODEL)), out=inner.output("inner", ["n", D_MODEL]))
    chosen = s.op("Greater", s.op("ReduceMax", "x", keepdims=0), s.number(0))
    s.op("If", chosen, out=s.output("y", ["n", D_MODEL]), then_branch=then.graph("then"), else_branch=other.graph("other"))
    return s


def write_x(folder: Path, count: int, dtype: Any = np.float32) -> Path:
    """Feeds ``x [2, 16, 64]``."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(5)
    for number in range(count):
        np.savez(folder / f"{number:02d}.npz", x=random.standard_normal((2, 16, D_MODEL)).astype(dtype))
    return folder
