"""drop-neurons: which neurons are proved to do nothing, and which must stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan

D, FF = 8, 32
X = {"x": np.random.default_rng(5).normal(size=(2, 5, D)).astype(np.float32)}


class Block:
    """x + down(act(up(norm x))) with weights at hand to spoil."""

    def __init__(self, activation: str = "gelu", *, gated: bool = False, norm: bool = False, bias: bool = True) -> None:
        self.activation, self.gated, self.norm, self.has_bias = activation, gated, norm, bias
        self.sketch = Sketch()
        s = self.sketch
        self.up, self.gate, self.down = s.numbers(D, FF), s.numbers(D, FF), s.numbers(FF, D)
        self.up_bias, self.gate_bias, self.down_bias = (s.numbers(n, scale=0.3) for n in (FF, FF, D))

    def model(self) -> Sketch:
        s = self.sketch
        x = s.input("x", ["batch", "tokens", D])
        y = s.norm(x, D) if self.norm else x
        hidden = self._linear(y, self.up, self.up_bias)
        if self.gated:
            hidden = s.op("Mul", s.activation(self.activation, self._linear(y, self.gate, self.gate_bias)), hidden)
        else:
            hidden = s.activation(self.activation, hidden)
        s.info(hidden, ["batch", "tokens", FF])
        s.op("Add", x, self._linear(hidden, self.down, self.down_bias), out=s.output("y", ["batch", "tokens", D]))
        return s

    def _linear(self, x: str, weight: np.ndarray, bias: np.ndarray) -> str:
        y = self.sketch.op("MatMul", x, self.sketch.weight(weight))
        return self.sketch.op("Add", y, self.sketch.weight(bias)) if self.has_bias else y


def drop(s: Sketch, folder: Path, options: str = "multiple=1") -> tuple[Model, PassResult]:
    onnx.save_model(s.model(), folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse([f"drop-neurons:{options}"]), threads=1)
    model.save(folder / "dropped.onnx")
    return Model.load(folder / "dropped.onnx"), result


def width(model: Model) -> int:
    return find_ffn_blocks(model)[0].d_ff


def check(block: Block, folder: Path, left: int, options: str = "multiple=1") -> Model:
    s = block.model()
    model, _ = drop(s, folder, options)
    assert width(model) == left
    assert drift(run(s.model(), X), run(model, X)) < 1e-6
    return model


@pytest.mark.parametrize("gated", [False, True])
def test_a_neuron_that_nothing_reads_goes(tmp_path, gated):
    block = Block("silu", gated=gated)
    block.down[[3, 7]] = 0
    check(block, tmp_path, FF - 2)


def test_a_neuron_that_reads_nothing_moves_into_the_bias(tmp_path):
    block = Block("gelu")
    block.up[:, [0, 31]] = 0
    check(block, tmp_path, FF - 2)


def test_a_constant_neuron_stays_where_there_is_no_bias_to_move_to(tmp_path):
    block = Block("sigmoid", bias=False)
    block.up[:, 4] = 0  # gives 0.5
    check(block, tmp_path, FF)


def test_a_neuron_with_a_closed_gate_goes(tmp_path):
    block = Block("relu", gated=True)
    block.gate[:, 5] = 0
    block.gate_bias[5] = -1
    check(block, tmp_path, FF - 1)


def test_a_neuron_with_a_gate_open_by_a_constant_stays(tmp_path):
    block = Block("relu", gated=True)
    block.gate[:, 5] = 0
    block.gate_bias[5] = 1
    check(block, tmp_path, FF)


@pytest.mark.parametrize("gated", [False, True])
def test_equal_neurons_become_one(tmp_path, gated):
    block = Block("gelu", gated=gated)
    for array in (block.up.T, block.gate.T, block.up_bias, block.gate_bias):
        array[9] = array[20] = array[2]
    check(block, tmp_path, FF - 2)


def test_neurons_that_differ_in_the_bias_only_stay(tmp_path):
    block = Block("gelu")
    block.up[:, 9] = block.up[:, 2]
    check(block, tmp_path, FF)


def test_a_relu_that_the_norm_proves_closed_goes(tmp_path):
    block = Block("relu", norm=True)
    block.up_bias[[1, 8]] = -100
    check(block, tmp_path, FF - 2)


def test_without_a_norm_nothing_is_known_of_a_relu(tmp_path):
    block = Block("relu")
    block.up_bias[[1, 8]] = -100
    check(block, tmp_path, FF)


def test_a_relu_near_its_bound_stays(tmp_path):
    block = Block("relu", norm=True)
    block.up_bias[1] = -1.0  # closed on most inputs, not on all
    check(block, tmp_path, FF)


def test_a_relu_proved_open_everywhere_goes(tmp_path):
    block = Block("relu", norm=True)
    block.up_bias += 100
    s = block.model()
    model, result = drop(s, tmp_path)
    assert result.fired == 1
    assert "Relu" not in ops(model)
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_the_bound_holds_for_the_worst_input(tmp_path):
    """The input that opens a neuron most: x̂ along the centred γ ∘ w. The bound must not call that neuron closed."""
    block = Block("relu", norm=True)
    s = block.model()
    model, _ = drop(s, tmp_path)
    first = find_ffn_blocks(model)[0]
    norm = next(node for node in model.graph.nodes if node.op == "LayerNormalization")
    gamma, beta = (norm.inputs[i]._values.load().astype(np.float64) for i in (1, 2))
    w = first.up.weight().astype(np.float64)
    direction = gamma[:, None] * w - (gamma[:, None] * w).mean(axis=0)
    x = (1e3 * direction.T[None]).astype(np.float32)
    bare = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    reached = np.einsum("bti,it->bt", bare * gamma + beta, w)[0]
    radius = np.sqrt(D) * np.linalg.norm(direction, axis=0)
    assert np.allclose(reached - beta @ w, radius, rtol=1e-4)


def test_the_width_stays_a_multiple(tmp_path):
    block = Block("gelu")
    block.down[:3] = 0
    check(block, tmp_path, FF, "multiple=16")
    block = Block("gelu")
    block.down[:17] = 0
    check(block, tmp_path, 16, "multiple=16")


def test_transposed_weights(tmp_path):
    s = Sketch()
    up, down = s.numbers(FF, D), s.numbers(D, FF)
    up[3], down[:, 6] = 0, 0
    up[11] = up[10]
    x = s.input("x", ["rows", D])
    bias = s.numbers(FF)
    bias[11] = bias[10]
    hidden = s.op("Relu", s.op("Gemm", x, s.weight(up), s.weight(bias), transB=1))
    s.op("Add", x, s.op("Gemm", hidden, s.weight(down), s.weight(s.numbers(D)), transB=1), out=s.output("y"))
    model, result = drop(s, tmp_path)
    assert result.fired == 3
    assert width(model) == FF - 3
    feed = {"x": X["x"][0]}
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


def test_a_shared_weight_stays(tmp_path):
    s = Sketch()
    up, down = s.numbers(D, FF), s.numbers(FF, D)
    down[3] = 0
    x = s.input("x", ["rows", D])
    weights = s.weight(up), s.weight(down)
    for _ in range(2):
        x = s.op("Add", x, s.op("MatMul", s.op("Relu", s.op("MatMul", x, weights[0])), weights[1]))
    s.op("Neg", x, out=s.output("y"))
    model, result = drop(s, tmp_path)
    assert result.fired == 0
    assert "shared" in result.refused[0].reason
    assert width(model) == FF


def test_a_hidden_value_that_is_read_elsewhere_stays(tmp_path):
    block = Block("relu")
    block.down[3] = 0
    s = block.model()
    s.op("ReduceMean", next(node.output[0] for node in s.nodes if node.op_type == "Relu"), out=s.output("mean"), axes=[-1])
    model, result = drop(s, tmp_path)
    assert result.fired == 0
    assert "read elsewhere" in result.refused[0].reason
    assert width(model) == FF


def test_a_width_written_into_a_reshape_stays(tmp_path):
    s = Sketch()
    down = s.numbers(FF, D)
    down[3] = 0
    x = s.input("x", [2, 5, D])
    hidden = s.op("Relu", s.op("MatMul", x, s.weight(s.numbers(D, FF))))
    rows = s.op("Reshape", hidden, s.weight(np.asarray([10, FF])))
    y = s.op("Reshape", s.op("MatMul", rows, s.weight(down)), s.weight(np.asarray([2, 5, D])))
    s.op("Add", x, y, out=s.output("y"))
    model, result = drop(s, tmp_path)
    assert result.fired == 0
    assert "Reshape" in result.refused[0].reason
    assert width(model) == FF


def test_ordinary_weights_stay(tmp_path):
    check(Block("gelu", norm=True), tmp_path, FF)
