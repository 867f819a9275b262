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


def tight(block: Block, neuron: int) -> tuple[float, float]:
    """Make the worst input of ``neuron`` one that a LayerNorm can give (no mean); returns radius and centre of its bound."""
    gamma, beta = (onnx.numpy_helper.to_array(block.sketch.initializers[f"weight_{i}"]) for i in (0, 1))
    w = np.linspace(-1, 1, D)
    block.up[:, neuron] = (w / gamma).astype(np.float32)
    return float(np.sqrt(D) * np.linalg.norm(w)), float(beta @ block.up[:, neuron])


@pytest.mark.parametrize(("share", "left"), [(0.999, FF), (1.001, FF - 1)])
def test_the_bound_is_what_the_worst_input_reaches(tmp_path, share, left):
    block = Block("relu", norm=True)
    block.model()  # draws the norm's numbers, which are the same again below
    radius, centre = tight(block, 3)
    block.up_bias[3] = -share * radius - centre
    bias, up = block.up_bias, block.up
    block = Block("relu", norm=True)
    block.up, block.up_bias = up, bias
    s = block.model()
    model, _ = drop(s, tmp_path)
    assert width(model) == left
    worst = {"x": 1e3 * np.linspace(-1, 1, D).astype(np.float32).reshape(1, 1, D)}
    assert drift(run(s.model(), worst), run(model, worst)) < 1e-6


def test_a_slope_too_small_to_see_is_no_relu(tmp_path):
    s = Sketch()
    block = Block("relu", norm=True)
    block.sketch = s
    block.up_bias[[1, 8]] = -100
    x = s.input("x", ["batch", "tokens", D])
    leaky = s.op("LeakyRelu", block._linear(s.norm(x, D), block.up, block.up_bias), alpha=1e-4)
    s.op("Add", x, block._linear(leaky, block.down, block.down_bias), out=s.output("y"))
    model, result = drop(s, tmp_path)
    assert find_ffn_blocks(model)[0].activation.name == "relu"  # on the grid it looks like one
    assert (result.fired, width(model)) == (0, FF)


@pytest.mark.parametrize("more", [0.0, 1.0])
def test_a_value_of_zero_counts_only_where_it_is_a_factor(tmp_path, more):
    """(u + 1) · silu(g), as gpt-oss has it, is not zero where u is."""
    s = Sketch()
    up, gate, down = s.numbers(D, FF), s.numbers(D, FF), s.numbers(FF, D)
    up[:, 4] = 0
    x = s.input("x", ["batch", "tokens", D])
    value = s.op("Add", s.op("MatMul", x, s.weight(up)), s.number(more))
    hidden = s.op("Mul", value, s.activation("silu", s.op("MatMul", x, s.weight(gate))))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(down)), out=s.output("y"))
    model, _ = drop(s, tmp_path)
    assert width(model) == (FF if more else FF - 1)
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_a_clip_at_zero_proved_closed_goes(tmp_path):
    s = Sketch()
    block = Block("relu", norm=True)
    block.sketch = s
    block.up_bias[[1, 8]] = -100
    x = s.input("x", ["batch", "tokens", D])
    clipped = s.op("Clip", block._linear(s.norm(x, D), block.up, block.up_bias), s.number(0), s.number(6))
    s.op("Add", x, block._linear(clipped, block.down, block.down_bias), out=s.output("y"))
    model, _ = drop(s, tmp_path)
    assert width(model) == FF - 2
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


def test_a_gate_proved_open_loses_its_relu(tmp_path):
    block = Block("relu", gated=True, norm=True)
    block.gate_bias += 100
    s = block.model()
    model, result = drop(s, tmp_path)
    assert result.fired == 1
    assert "Relu" not in ops(model)
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


@pytest.mark.parametrize(("rows", "fired"), [(["batch", "tokens", D], 2), (["rows", D], 0)])
def test_a_bias_of_three_axes_keeps_them(tmp_path, rows, fired):
    s = Sketch()
    up, down, bias = s.numbers(D, FF), s.numbers(FF, D), s.numbers(1, 1, FF)
    down[3], up[:, 5] = 0, 0
    x = s.input("x", rows)
    hidden = s.op("Sigmoid", s.op("Add", s.op("MatMul", x, s.weight(up)), s.weight(bias)))
    y = s.op("Add", s.op("MatMul", hidden, s.weight(down)), s.weight(s.numbers(1, 1, D)))
    s.op("Add", x, y, out=s.output("y"))
    model, result = drop(s, tmp_path)
    assert result.fired == fired
    feed = {"x": X["x"] if len(rows) == 3 else X["x"][0]}
    assert drift(run(s.model(), feed), run(model, feed)) < 1e-6


def test_products_scaled_by_alpha_stay(tmp_path):
    s = Sketch()
    down = s.numbers(FF, D)
    down[3] = 0
    x = s.input("x", ["rows", D])
    hidden = s.op("Relu", s.op("Gemm", x, s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF)), alpha=0.5))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(down)), out=s.output("y"))
    _, result = drop(s, tmp_path)
    assert result.fired == 0
    assert "alpha" in result.refused[0].reason


def test_a_shared_bias_is_copied_only_where_the_file_gets_smaller(tmp_path):
    for columns, fired in ((1, 0), (16, 16)):
        s = Sketch()
        d, wide = 2, 64
        down, bias = s.numbers(wide, d), s.weight(s.numbers(wide))
        down[:columns] = 0
        x = s.input("x", ["rows", d])
        hidden = s.op("Relu", s.op("Add", s.op("MatMul", x, s.weight(s.numbers(d, wide))), bias))
        s.op("Add", x, s.op("MatMul", hidden, s.weight(down)), out=s.output("y"))
        s.op("Neg", bias, out=s.output("bias"))
        _, result = drop(s, tmp_path)
        assert result.fired == fired
        if not fired:
            assert "grow" in result.refused[0].reason


def test_where_every_neuron_does_nothing_one_multiple_stays(tmp_path):
    block = Block("gelu")
    block.down[:] = 0
    check(block, tmp_path, 16, "multiple=16")


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


@pytest.mark.parametrize("which", [0, -1])
def test_a_product_without_its_bias_that_is_an_output_stays(tmp_path, which):
    block = Block("gelu")
    block.down[3] = 0
    block.up[:, 4] = 0
    s = block.model()
    products = [node.output[0] for node in s.nodes if node.op_type == "MatMul"]
    s.output(products[which])
    model, result = drop(s, tmp_path)
    assert result.fired == 0
    assert "read elsewhere" in result.refused[0].reason
    assert drift(run(s.model(), X), run(model, X)) < 1e-6


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


@pytest.mark.parametrize("where", ["up", "bias"])
def test_a_neuron_that_holds_an_infinity_stays(tmp_path, where):
    block = Block("relu")
    block.down[3] = block.down[4] = 0
    if where == "up":
        block.up[2, 3] = np.inf
    else:
        block.up_bias[3] = np.inf
    s = block.model()
    model, result = drop(s, tmp_path)
    assert result.fired == 1
    assert np.isnan(run(s.model(), X)["y"]).any()
    np.testing.assert_array_equal(np.isnan(run(s.model(), X)["y"]), np.isnan(run(model, X)["y"]))


def test_a_block_without_neurons_is_refused(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    hidden = s.op("Relu", s.op("Add", s.op("MatMul", x, s.weight(s.numbers(D, 0))), s.weight(s.numbers(0, scale=1))))
    y = s.op("Add", s.op("MatMul", hidden, s.weight(np.zeros((0, D), np.float32))), s.weight(s.numbers(D)))
    s.op("Add", x, y, out=s.output("y"))
    _, result = drop(s, tmp_path)
    assert (result.fired, [each.reason for each in result.refused]) == (0, ["it has no neurons"])
