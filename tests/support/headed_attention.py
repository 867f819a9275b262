"""Attention with several heads, as exporters write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ffn_graphs import Sketch

HEADS, WIDTH = 2, 4
D = HEADS * WIDTH


class Heads(Sketch):
    """Attention with heads, and an FFN, on x [batch, tokens, 8]; each step can be spelled otherwise."""

    def __init__(self, opset: int = 17, dtype: Any = np.float32, *, target: str = "zeros", value_width: int = WIDTH,
                 scores: Callable[[Heads, str, str], str] | None = None, last: str = "zeros") -> None:
        super().__init__(opset, dtype=dtype)
        self.target, self.last, self.value_width = target, last, value_width
        self.x = self.input("x", ["batch", "tokens", D])
        self.memory = self.x
        self._scores = scores or Heads.scaled

    def ints(self, *values: int) -> str:
        return self.weight(np.asarray(values, np.int64))

    def heads(self, y: str, *perm: list[int], width: int = WIDTH) -> str:
        """y divided into heads and turned."""
        if self.target == "shape":
            size = self.op("Slice", self.op("Shape", y), self.ints(0), self.ints(2))
            shape = self.op("Concat", size, self.ints(HEADS), self.ints(width), axis=0)
        else:
            heads, wide = {"zeros": (HEADS, width), "heads": (HEADS, -1), "width": (-1, width)}[self.target]
            shape = self.ints(0, 0, heads, wide)
        y = self.op("Reshape", y, shape)
        for each in perm:
            y = self.op("Transpose", y, perm=each)
        return y

    def scaled(self, q: str, k: str) -> str:
        return self.op("Mul", self.op("MatMul", q, k), self.number(WIDTH ** -0.5))

    def query(self) -> str:
        return self.heads(self.linear(self.x, D, D), [0, 2, 1, 3])

    def key(self) -> str:
        return self.heads(self.linear(self.memory, D, D), [0, 2, 3, 1])

    def value(self) -> str:
        return self.heads(self.linear(self.memory, D, HEADS * self.value_width), [0, 2, 1, 3], width=self.value_width)

    def build(self) -> Heads:
        scores = self._scores(self, self.query(), self.key())
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), self.value())
        joined = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        wide = HEADS * self.value_width
        if self.last != "zeros":
            size = self.op("Slice", self.op("Shape", joined if self.last == "shape" else self.x), self.ints(0), self.ints(2))
            target = self.op("Concat", size, self.ints(wide), axis=0)
        else:
            target = self.ints(0, 0, wide)
        rows = self.op("Reshape", joined, target)
        stream = self.op("Add", self.x, self.linear(rows, wide, D))
        self.op("Add", stream, self.ffn(stream, D, 16), out=self.output("y", ["batch", "tokens", D]))
        return self
