"""The exact plan on small transformers drawn at random: the same outputs, no more to execute, no larger file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, optimized_ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.plan import EXACT_PLAN, Plan
from ffnfold.passes.runner import run_plan

D, HEADS = 16, 2
NAMES = 1024  # bytes for new names


class Draw:
    """A transformer whose every choice is made by a generator."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.s = Sketch(int(self.random.choice([12, 14, 17, 20])), seed)
        self.flat = self.chance(0.3)
        self.bias = self.chance(0.7)
        self.kept: list[str] = []

    def chance(self, share: float = 0.5) -> bool:
        return bool(self.random.random() < share)

    def weight(self, *shape: int) -> str:
        """A matrix: now and then one used before, with rows or columns of zeros, twice the same, or behind a node."""
        s, array = self.s, self.s.numbers(*shape)
        for name in self.kept:
            if self.chance(0.05) and tuple(s.initializers[name].dims) == shape:
                return name
        if self.chance(0.3):
            array[:, self.random.integers(shape[1], size=3)] = 0
        if self.chance(0.3):
            array[self.random.integers(shape[0], size=3)] = 0
        if self.chance(0.3):
            array[:, 1] = array[:, 0]
        form = self.random.integers(4)
        if form == 0:
            return s.op("Transpose", s.weight(np.ascontiguousarray(array.T)), perm=[1, 0])
        if form == 1:
            return s.op("Identity", s.weight(array))
        self.kept.append(s.weight(array))
        return self.kept[-1]

    def linear(self, x: str, d_in: int, d_out: int) -> str:
        s = self.s
        if self.chance(0.15):
            x = s.op("Add", x, s.weight(s.numbers(d_in, scale=0.3)))
        bias = s.numbers(d_out, scale=0.3) * (not self.chance(0.2))
        if self.flat and self.chance():
            rows = s.op("Reshape", x, s.weight(np.asarray([-1, d_in])))
            y = s.op("Gemm", rows, self.weight(d_in, d_out), *([s.weight(bias)] if self.bias else []))
            return s.op("Reshape", y, s.weight(np.asarray([2, -1, d_out])))
        y = s.op("MatMul", x, self.weight(d_in, d_out))
        return s.op("Add", *[y, s.weight(bias)][:: -1 if self.chance() else 1]) if self.bias else y

    def norm(self, x: str) -> str:
        s = self.s
        if s.opset >= 17 and self.chance():
            return s.norm(x, D)
        centred = s.op("Sub", x, s.op("ReduceMean", x, axes=[-1])) if self.chance() and s.opset < 18 else x
        squares = s.op("Pow", centred, s.number(2))
        mean = (s.op("ReduceMean", squares, s.weight(np.asarray([-1]))) if s.opset >= 18
                else s.op("ReduceMean", squares, axes=[-1]))
        y = s.op("Div", centred, s.op("Sqrt", s.op("Add", mean, s.number(1e-5))))
        y = s.op("Mul", y, s.weight(1 + s.numbers(D, scale=0.1)))
        return s.op("Add", y, s.weight(s.numbers(D, scale=0.1))) if centred != x or self.chance() else y

    def attention(self, x: str) -> str:
        s = self.s
        cut = s.weight(np.asarray([0, 0, HEADS, D // HEADS]))
        query, key, value = (s.op("Transpose", s.op("Reshape", self.linear(x, D, D), cut), perm=perm)
                             for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
        weights = s.op("Softmax", s.op("Mul", s.op("MatMul", query, key), s.number(0.35)), axis=3)
        if self.chance(0.2):
            weights = s.op("Mul", weights, s.number(0.5))
        mixed = s.op("Transpose", s.op("MatMul", weights, value), perm=[0, 2, 1, 3])
        return self.linear(s.op("Reshape", mixed, s.weight(np.asarray([0, 0, D]))), D, D)

    def ffn(self, x: str) -> str:
        s = self.s
        name = str(self.random.choice(["relu", "gelu", "gelu_tanh", "silu", "relu2", "tanh", "identity"]))
        hidden = s.activation(name, self.linear(x, D, 48))
        if self.chance(0.4):
            hidden = s.op("Mul", hidden, self.linear(x, D, 48))
        if self.chance(0.1):
            s.op("ReduceMax", hidden, out=s.output(f"seen_{len(s.nodes)}"), keepdims=0)
        return self.linear(hidden, 48, D)

    def model(self) -> Sketch:
        s = self.s
        x = s.input("x", [2, "tokens", D])
        for _ in range(2):
            before = self.chance(0.7)
            for part in (self.attention, self.ffn):
                x = s.op("Add", x, part(self.norm(x))) if before else self.norm(s.op("Add", x, part(x)))
        s.op("Identity", x, out=s.output("y"))
        return s


@pytest.mark.parametrize("seed", range(20))
def test_a_transformer_drawn_at_random(tmp_path: Path, seed: int) -> None:
    s = Draw(seed).model()
    path = s.save(tmp_path / "model.onnx")
    model = Model.load(path)
    more = ["drop-neurons:multiple=1", "merge-linears:force=true"] if seed % 2 else []
    results = run_plan(model, Plan.parse([*EXACT_PLAN, *more]), threads=1)
    assert sum(result.fired for result in results) > 0
    model.save(tmp_path / "after.onnx")
    for tokens, scale in ((5, 1), (1, 1e3)):
        feed = {"x": np.random.default_rng(seed).normal(size=(2, tokens, D), scale=scale).astype(np.float32)}
        assert drift(run(s.model(), feed), run(Model.load(tmp_path / "after.onnx"), feed)) < 1e-5
    executed = [len(optimized_ops(tmp_path / name, tmp_path)) for name in ("model.onnx", "after.onnx")]
    assert executed[1] <= executed[0]
    assert (tmp_path / "after.onnx").stat().st_size <= path.stat().st_size + NAMES
