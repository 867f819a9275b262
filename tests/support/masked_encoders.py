"""Encoders of tokens, some of which are padding, and what skip-padding makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from ffn_graphs import Sketch
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from onnx import TensorProto

D, WORDS, LAYERS = 8, 40, 2
ROWS = ["batch", "tokens", D]
PRODUCTS = 6 * LAYERS
MASKS = {
    "right": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[0, 1, 0, 1, 1], [1, 0, 1, 0, 1], [0, 1, 1, 1, 0]],
    "none": [[1, 1, 1, 1, 1]],
    "one": [[0, 0, 0, 1, 0]],
    "all": [[0, 0, 0], [0, 0, 0]],
}


class Encoder(Sketch):
    """Layers of attention, with a mask, and FFN on embedded tokens."""

    def __init__(self, *, dims: Any = ("batch", "tokens"), masked: bool = True, opset: int = 17, dtype: Any = np.float32,
                 mask_type: int = TensorProto.INT64) -> None:
        super().__init__(opset, dtype=dtype)
        self.masked = masked
        self.ids = self.input("input_ids", ["batch", "tokens"], TensorProto.INT64)
        self.mask = self.input("attention_mask", dims, mask_type)
        self.floats = self.op("Cast", self.mask, to=self.onnx_type)
        self.axes = {axis: self.weight(np.asarray([axis], np.int64)) for axis in (1, 2)}
        self.last = self.embedded()

    def embedded(self) -> str:
        return self.norm(self.op("Gather", self.weight(self.numbers(WORDS, D, scale=1.0)), self.ids), D)

    def attention(self, x: str) -> str:
        q, k, v = (self.linear(x, D, D) for _ in range(3))
        scores = self.op("MatMul", self.op("Mul", q, self.number(D ** -0.5)), self.op("Transpose", k, perm=[0, 2, 1]))
        if self.masked:
            gone = self.op("Mul", self.op("Sub", self.floats, self.number(1)), self.number(3e4))
            scores = self.op("Add", scores, self.op("Unsqueeze", gone, self.axes[1]))
        return self.linear(self.op("MatMul", self.op("Softmax", scores, axis=-1), v), D, D)

    def layers(self, count: int = LAYERS, **ffn: Any) -> str:
        for number in range(count):
            x = self.norm(self.op("Add", self.last, self.attention(self.last)), D)
            self.last = self.norm(self.op("Add", x, self.ffn(x, D, 32, name=f"/{number}", **ffn), out=f"stream_{number}"), D)
        return self.last

    def give_rows(self, name: str = "y") -> Encoder:
        self.op("Identity", self.last, out=self.output(name, ROWS))
        return self

    def give_mean(self, *, masked: bool = True) -> Encoder:
        rows = self.last
        if masked:
            weights = self.op("Unsqueeze", self.floats, self.axes[2])
            counted = self.op("Max", self.op("ReduceSum", weights, self.axes[1], keepdims=0), self.number(1e-3))
            total = self.op("ReduceSum", self.op("Mul", rows, weights), self.axes[1], keepdims=0)
            self.op("Div", total, counted, out=self.output("mean", ["batch", D]))
        else:
            self.op("ReduceMean", rows, out=self.output("mean", ["batch", D]), axes=[1], keepdims=0)
        return self


def encoder(**how: Any) -> Encoder:
    made = Encoder(**how)
    made.layers()
    return made.give_rows().give_mean()


def feed_of(mask: Any, dtype: Any = np.int64) -> dict[str, np.ndarray]:
    given = np.asarray(mask)
    return {"input_ids": np.random.default_rng(1).integers(0, WORDS, given.shape), "attention_mask": given.astype(dtype)}


def skipped(s: Sketch, folder: Any, plan: list[str] | None = None, fit: Feeds | None = None) -> tuple[Model, PassResult]:
    """The model after the pass (and what else the plan says), read back from a file."""
    model = Model.load(s.save(folder / "model.onnx"))
    result = run_plan(model, Plan.parse(plan or ["skip-padding"]), fit=fit, threads=1)[-1]
    model.save(folder / "skipped.onnx")
    return Model.load(folder / "skipped.onnx"), result


def apart(before: dict[str, Any], after: dict[str, Any], mask: Any) -> float:
    """The largest difference over outputs, rows of padding left out."""
    worst = 0.0
    for name, ours in before.items():
        theirs = after[name]
        assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
        assert np.isfinite(theirs).all()
        if ours.ndim == 3:
            ours, theirs = ours[np.asarray(mask) != 0], theirs[np.asarray(mask) != 0]
        worst = max(worst, float(np.abs(theirs.astype(np.float64) - ours).max(initial=0)))
    return worst
