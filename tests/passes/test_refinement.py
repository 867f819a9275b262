"""slim-ffn:refine: the neurons that stay are moved, where that is better on tokens held out."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.activation import KNOWN
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.base import Context
from ffnfold.passes.fitting import refinement
from ffnfold.passes.fitting.kept_rows import KeptRows
from ffnfold.passes.fitting.neuron_fit import NeuronFit
from ffnfold.passes.fitting.refinement import ActivationTable, Narrow, _activation, _hidden, _narrow, _projections
from ffnfold.passes.slim_ffn import SlimFFN
from ffnfold.runtime import Feeds
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((8, 16, D), 20, seed=11)
[X] = feeds_of((4, 9, D))
[X32] = feeds_of((4, 9, 32))
KINDS = [{"activation": "gelu"}, {"activation": "silu", "gated": True, "bias": False}, {"activation": "relu", "pre_norm": False},
         {"activation": "gelu_tanh", "gated": True}]


@pytest.mark.parametrize("affine", ["true", "false"])
@pytest.mark.parametrize("kind", KINDS)
def test_moved_neurons_lose_less_on_inputs_that_were_not_fitted_to(tmp_path, kind, affine):
    s = transformer(2, **kind)
    before, errors = run(s.model(), X), {}
    for refine in (0, 8):
        model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep=8,multiple=1,affine={affine},refine={refine}", fit=FIT)
        assert (result.fired, [block.d_ff for block in find_ffn_blocks(model)]) == (2, [8, 8])
        errors[refine] = drift(before, run(model, X))
    assert errors[8] < 0.99 * errors[0]


def test_nothing_is_added_to_the_graph(tmp_path):
    """Where the projections have no bias they get none, and the nodes are the same ones."""
    s = transformer(2, activation="silu", gated=True, bias=False)
    plan = "slim-ffn:keep=8,multiple=8,affine=false"
    first, second = (rewrite(s, tmp_path, f"{plan},refine={refine}", fit=FIT)[0] for refine in (0, 2))
    assert ops(first) == ops(second)


def test_what_is_right_already_stays(tmp_path):
    """Half of the neurons give nothing: the others are the block, and no descent makes that better."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    down = s.numbers(FF, D)
    down[::2] = 0
    hidden = s.activation("gelu", s.linear(x, D, FF))
    s.op("Add", x, s.op("MatMul", hidden, s.weight(down)), out=s.output("y"))
    left = []
    for refine in (0, 4):
        model, _ = rewrite(s, tmp_path, f"slim-ffn:keep=16,multiple=1,affine=false,refine={refine}", fit=FIT)
        left.append(run(model, X)["y"])
    assert (left[0] == left[1]).all()


def test_neurons_whose_activations_differ_stay(tmp_path):
    """A PReLU with a slope for each neuron is no one function: what the closed form gives is what comes out."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    slopes = s.weight(np.linspace(0.1, 0.6, FF).astype(np.float32))
    hidden = s.op("PRelu", s.linear(x, D, FF), slopes)
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    left = []
    for refine in (0, 4):
        model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep=8,multiple=1,refine={refine}", fit=FIT)
        assert result.fired == 1
        assert [each for each in result.notes if "all its neurons share" in each] == list(result.notes)
        assert len(result.notes) == bool(refine)
        left.append(run(model, X)["y"])
    assert (left[0] == left[1]).all()


def test_the_same_bytes_every_time(tmp_path):
    s = transformer(2, activation="gelu")
    first, second = (run(rewrite(s, tmp_path, "slim-ffn:keep=8,multiple=1,refine=3", fit=FIT)[0], X) for _ in range(2))
    assert (first["y"] == second["y"]).all()


def test_less_than_no_descent(tmp_path):
    with pytest.raises(InputError, match="refine=-1"):
        rewrite(transformer(1), tmp_path, "slim-ffn:refine=-1", fit=FIT)


def fused(columns: str) -> Sketch:
    """A gated block whose gate and up are one matrix, one behind the other or in turn, with a bias behind it."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    both = s.linear(x, D, 2 * FF)
    if columns == "halves":
        gate, up = s.op("Split", both, out=["gate", "up"], axis=-1) and ("gate", "up")
    else:
        last = s.weight(np.array([-1]))
        ends, two = s.weight(np.array([1 << 60])), s.weight(np.array([2]))
        gate, up = (s.op("Slice", both, s.weight(np.array([start])), ends, last, two) for start in (0, 1))
    hidden = s.op("Mul", s.activation("silu", gate), s.op("Add", up, s.weight(s.numbers(FF))))
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    return s


@pytest.mark.parametrize("s", [*(transformer(1, **kind) for kind in KINDS), fused("halves"), fused("turns")])
def test_projections_that_did_not_move_are_those_of_the_block(tmp_path, s):
    """What is put in through ``projections`` lands in the right branch, column for column, bias for bias."""
    found = []
    neurons = np.array([1, 4, 9, 30])
    for moved in (False, True):
        model = Model.load(s.save(tmp_path / "before.onnx"))
        [block] = find_ffn_blocks(model)
        fit = NeuronFit(neurons, block.down.weight()[neurons], None, np.zeros(D), 0.0, 0.0)
        function = _activation(block)
        assert function is not None
        narrow = _narrow(block, fit, function)
        if moved:
            fit = dataclasses.replace(fit, projections=_projections(block, fit, narrow.matrices))
        SlimFFN(affine=False).rewrite(model, block, fit, Context(Feeds.of([X]), Feeds.of([X])))
        found.append(run(model, X)["y"])
    assert np.abs(found[0] - found[1]).max() < 1e-5
    assert np.abs(found[0] - run(s.model(), X)["y"]).max() > 1e-3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradients_are_what_differences_say(gated, affine):
    random = np.random.default_rng(0)
    held = {name: random.standard_normal(shape) for name, shape in {
        "up": (5, 7), "up_bias": (7,), "down": (7, 3), "offset": (3,), **({"gate": (5, 7), "gate_bias": (7,)} if gated else {}),
        **({"affine": (5, 3)} if affine else {})}.items()}
    narrow = Narrow(held, ActivationTable(np.tanh, -12, 12))
    x, t, weights = random.standard_normal((11, 5)), random.standard_normal((11, 3)), random.random(11)

    def loss() -> float:
        y = narrow.hidden(x)[0] @ held["down"] + held["offset"] + (x @ held["affine"] if affine else 0)
        return 0.5 * float((weights[:, None] * (y - t) ** 2).sum())

    found = narrow.gradients(x, t, weights)
    assert found.keys() == held.keys()
    for name, matrix in held.items():
        for place in [np.unravel_index(number, matrix.shape) for number in (0, matrix.size // 2, matrix.size - 1)]:
            kept, values = matrix[place], []
            for step in (0.03, -0.03):
                matrix[place] = kept + step
                values.append(loss())
            matrix[place] = kept
            assert found[name][place] == pytest.approx((values[0] - values[1]) / 0.06, rel=0.02, abs=0.02)


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "mish"])
def test_the_table_of_an_activation(name):
    curve = ActivationTable(KNOWN[name], -20, 20)
    z = np.random.default_rng(0).uniform(-30, 30, (40, 50)).astype(np.float32)
    value, slope = curve(z)
    assert np.abs(value - KNOWN[name](z)).max() < 2e-4
    away = np.abs(z) > 0.05
    assert np.abs(slope - (KNOWN[name](z + 1e-3) - KNOWN[name](z - 1e-3)) / 2e-3)[away].max() < 1e-2


def test_activations_are_taken_from_the_graph(tmp_path):
    for kind in KINDS:
        [block] = find_ffn_blocks(Model.load(transformer(1, **kind).save(tmp_path / "before.onnx")))
        function = _activation(block)
        assert function is not None
        z = np.linspace(-5, 5, 21)
        assert np.allclose(function(z), KNOWN[kind["activation"]](z), atol=1e-3)


def test_kept_rows_are_spread_evenly_where_there_are_too_many():
    rows = KeptRows(2, limit=2 * 5 * 4 * 6)  # two feeds, 5 rows each of 2 + 3 + 1 numbers
    for start in (0, 100):
        number = np.arange(start, start + 21, dtype=np.float64)
        rows.add(np.stack([number] * 2, 1), np.stack([number] * 3, 1), np.full(21, 0.5), number % 10 == 0)
    x, t, weights = rows.take(held=False)
    assert x[:, 1].tolist() == t[:, 2].tolist() == [1, 6, 13, 19, 101, 106, 113, 119]
    assert weights.tolist() == [0.5 * 18 / 4] * 8, "each counts for those left out, too"
    assert [len(rows.take(held=True)[2]) for _ in range(2)] == [2, 0], "they are there once"
    assert x.dtype == t.dtype == weights.dtype == np.float32


@pytest.mark.parametrize("part", [0.2, 0.4, 0.6, 0.8])
def test_no_number_of_kept_rows_leaves_out_those_that_choose(part):
    rows = KeptRows(1, limit=int(part * 2500 * 4 * 3))
    x = np.ones((2500, 1))
    rows.add(x, x, np.ones(2500), np.arange(2500) % 5 == 4)
    assert len(rows.take(held=True)[2]) == pytest.approx(0.2 * part * 2500, abs=2)
    assert len(rows.take(held=False)[2]) == pytest.approx(0.8 * part * 2500, abs=2)


@pytest.mark.parametrize("tokens", [10, 25])
def test_a_handful_of_tokens_does_no_harm(tmp_path, tokens):
    """What the descent learns by heart is no better on the tokens held out, which neither it nor its beginning has seen."""
    s = transformer(1, 32, 128, activation="silu", gated=True)
    before, errors, notes = run(s.model(), X32), {}, ()
    fit = feeds_of((1, tokens, 32), 10, seed=5)
    for refine in (0, 4, 40):
        model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep=0.5,affine=false,refine={refine}", fit=fit)
        errors[refine] = drift(before, run(model, X32))
        notes = result.notes
    assert max(errors.values()) <= 1.02 * errors[0]
    assert errors[40] < errors[0] or "of block 0 were not moved: it was not better on tokens held out" in notes[0]


def test_a_block_of_two_types(tmp_path):
    """As T5 in float16 has it: the down projection in float32 behind a Cast."""
    s = Sketch(dtype=np.float16)
    x = s.input("x", ["batch", "tokens", D], onnx.TensorProto.FLOAT)
    half = s.op("Cast", x, to=onnx.TensorProto.FLOAT16)
    hidden = s.op("Cast", s.op("Relu", s.op("MatMul", half, s.weight(s.numbers(D, FF).astype(np.float16)))),
                  to=onnx.TensorProto.FLOAT)
    down = s.weight(s.numbers(FF, D).astype(np.float32))
    s.op("Add", x, s.op("MatMul", hidden, down), out=s.output("y", None, onnx.TensorProto.FLOAT))
    model, [result] = rewrite(s, tmp_path, "slim-ffn:keep=8,multiple=8,affine=false,refine=8", fit=FIT)
    assert (result.fired, result.notes) == (1, ())
    assert np.isfinite(run(model, X)["y"]).all()


@pytest.mark.parametrize("size", [1e7, 1e18])
def test_a_token_beyond_all_measure_stops_no_run(tmp_path, size):
    feeds = [dict(feed) for feed in FIT]
    feeds[3] = {"x": feeds[3]["x"].copy()}
    feeds[3]["x"][0, 0] *= np.float32(size)
    s = transformer(1, activation="gelu", pre_norm=False, gated=True)
    model, [result] = rewrite(s, tmp_path, "slim-ffn:keep=8,multiple=8,affine=false", fit=feeds)
    assert result.fired == 1
    assert np.isfinite(run(model, X)["y"]).all()


@pytest.mark.parametrize("bound", [4, 300])
def test_a_clipped_branch(tmp_path, bound):
    """h is act(g) · u only within the bounds: near ones are found out, and far ones are judged by the block's own h."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    up = s.op("Clip", s.op("MatMul", x, s.weight(bound * s.numbers(D, FF))), s.number(-bound), s.number(bound))
    hidden = s.op("Mul", s.activation("silu", s.linear(x, D, FF)), up)
    s.op("Add", x, s.linear(hidden, FF, D), out=s.output("y"))
    before, errors, notes = run(s.model(), X), {}, ()
    for refine in (0, 40):
        model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep=8,affine=false,multiple=1,refine={refine}", fit=FIT)
        errors[refine], notes = drift(before, run(model, X)), result.notes
    assert errors[40] <= 1.02 * errors[0]
    assert bound > 100 or "no function of one number" in notes[0]


def test_tokens_beyond_the_table_have_the_hidden_values_of_the_block(tmp_path):
    [block] = find_ffn_blocks(Model.load(transformer(1, activation="relu2", pre_norm=False).save(tmp_path / "before.onnx")))
    neurons = np.arange(FF)
    function = _activation(block)
    assert function is not None
    narrow = _narrow(block, NeuronFit(neurons, block.down.weight(), None, np.zeros(D), 0.0, 0.0), function)
    x = np.random.default_rng(0).standard_normal((50, D)).astype(np.float32) * np.where(np.arange(50) % 7 == 0, 1000, 1)[:, None]
    x = x.astype(np.float32)
    z = x.astype(np.float64) @ block.up.weight() + block.up.bias()
    assert np.abs(z).max() > 200
    assert np.allclose(_hidden(block, narrow, x), np.maximum(z, 0) ** 2, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("feeds", [6, 20, 40])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_descent_that_does_nothing_is_not_better(tmp_path, monkeypatch, kind, feeds):
    """What comes before it and what comes after it are fitted to the same tokens."""
    monkeypatch.setattr(refinement, "_descend", lambda *arguments: True)
    _, [result] = rewrite(transformer(3, **kind), tmp_path, "slim-ffn:keep=8,multiple=1,affine=false",
                          fit=feeds_of((2, 16, D), feeds, seed=5))
    assert sum("it was not better on tokens held out" in note for note in result.notes) == 3


@pytest.mark.parametrize(("feeds", "judging"), [(5, [4]), (20, [4, 9, 14, 19]), (40, [4, 24]), (60, [4, 24, 44])])
def test_which_feeds_judge(tmp_path, monkeypatch, feeds, judging):
    """At least one from five feeds on, and at least two where the others held out are fitted to."""
    seen = []
    monkeypatch.setattr(KeptRows, "add", lambda self, x, t, weights, held: seen.append(bool(held.all())))
    rewrite(transformer(1, activation="gelu"), tmp_path, "slim-ffn:keep=8,multiple=1", fit=feeds_of((1, 40, D), feeds, seed=5))
    assert [number for number, held in enumerate(seen) if held] == judging
