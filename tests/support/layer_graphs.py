"""Layers of transformers, attention and FFN, in the ways that they are joined to the residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
from ffn_graphs import Sketch

D = 8


def attention(s: Sketch, x: str, memory: str | None = None, *, d_model: int = D, bias: bool = True, name: str = "",
              gated: bool = False) -> str:
    """softmax(q kᵀ) v W_out with one head; keys and values from ``memory``, or from x."""
    memory = memory or x
    q = s.linear(x, d_model, d_model, bias=bias, name=name and f"{name}/q")
    k = s.linear(memory, d_model, d_model, bias=bias, name=name and f"{name}/k")
    v = s.linear(memory, d_model, d_model, bias=bias, name=name and f"{name}/v")
    scores = s.op("MatMul", s.op("Mul", q, s.number(d_model ** -0.5)), s.op("Transpose", k, perm=[0, 2, 1]))
    mixed = s.op("MatMul", s.op("Softmax", scores, axis=-1), v)
    if gated:
        mixed = s.op("Mul", mixed, s.op("Sigmoid", s.linear(x, d_model, d_model)))
    return s.linear(mixed, d_model, d_model, bias=bias, name=name and f"{name}/out")


def layer(s: Sketch, x: str, kind: str, number: int, **ffn: Any) -> str:
    """One layer on the stream x; the stream behind it. Attention joins it as ``middle_N``, the FFN as ``stream_N``."""
    at, at_ffn = f"/layer.{number}/attention", f"/layer.{number}/ffn"
    middle, end = f"middle_{number}", f"stream_{number}"
    if kind == "pre":
        x = s.op("Add", x, attention(s, s.norm(x, D), name=at), out=middle)
        return s.op("Add", x, s.ffn(s.norm(x, D), name=at_ffn, **ffn), out=end)
    if kind == "post":
        x = s.norm(s.op("Add", x, attention(s, x, name=at), out=middle), D)
        return s.norm(s.op("Add", x, s.ffn(x, name=at_ffn, **ffn), out=end), D)
    if kind == "sandwich":
        x = s.op("Add", x, s.norm(attention(s, s.norm(x, D), name=at), D), out=middle)
        return s.op("Add", x, s.norm(s.ffn(s.norm(x, D), name=at_ffn, **ffn), D), out=end)
    if kind == "branch-norm":
        x = s.op("Add", x, s.norm(attention(s, x, name=at), D), out=middle)
        return s.op("Add", x, s.norm(s.ffn(x, name=at_ffn, **ffn), D), out=end)
    normed = s.norm(x, D)
    if kind == "parallel":
        both = s.op("Add", attention(s, normed, name=at), s.ffn(normed, name=at_ffn, **ffn), out=middle)
        return s.op("Add", both, x, out=end)
    assert kind == "parallel-in-turn"
    x = s.op("Add", x, s.ffn(normed, name=at_ffn, **ffn), out=end)
    return s.op("Add", attention(s, normed, name=at), x, out=middle)


def layers(kind: str, count: int = 2, *, dtype: Any = np.float32, seed: int = 0, **ffn: Any) -> Sketch:
    """``count`` layers: x [batch, tokens, 8] → y."""
    s = Sketch(seed=seed, dtype=dtype)
    x = s.input("x", ["batch", "tokens", D])
    for number in range(count):
        x = layer(s, x, kind, number, **ffn)
    s.op("Identity", x, out=s.output("y", ["batch", "tokens", D]))
    return s


KINDS = ("pre", "post", "sandwich", "branch-norm", "parallel", "parallel-in-turn")


def encoder_decoder() -> Sketch:
    """An encoder of one layer, and a decoder layer with attention over itself and over the encoder."""
    s = Sketch()
    memory = layer(s, s.input("x", ["batch", "tokens", D]), "pre", 0)
    y = s.input("target", ["batch", "words", D])
    y = s.op("Add", y, attention(s, s.norm(y, D), name="/layer.1/attention"))
    y = s.op("Add", y, attention(s, s.norm(y, D), memory, name="/layer.1/cross"))
    s.op("Add", y, s.ffn(s.norm(y, D), name="/layer.1/ffn"), out=s.output("y", ["batch", "words", D]))
    return s


def skip_norms(post: bool) -> Sketch:
    """Two layers whose sums lie in SkipLayerNormalization."""
    s = Sketch()
    stream = s.input("x", ["batch", "tokens", D])
    normed = stream if post else s.norm(stream, D)
    for number in range(2):
        for branch in (attention(s, normed, name=f"/layer.{number}/attention"), None):
            added = branch or s.ffn(normed, name=f"/layer.{number}/ffn")
            outputs = [f"normed_{len(s.nodes)}"] + ([] if post else ["", "", f"sum_{len(s.nodes)}"])
            normed = s.op("SkipLayerNormalization", stream, added, s.weight(1 + s.numbers(D, scale=0.1)),
                          s.weight(s.numbers(D)), out=outputs, domain="com.microsoft", epsilon=1e-5)
            stream = normed if post else outputs[-1]
    s.op("Identity", normed, out=s.output("y", ["batch", "tokens", D]))
    return s
