"""Healing: blocks that stay make good what affine blocks before them do wrong, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, ops, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.fitting import moved, refinement
from ffnfold.passes.fitting.refinement import _activation, _narrow, _projections
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((8, 16, D), 20, seed=11)
[X] = feeds_of((4, 32, D))
KINDS = [{"activation": "gelu"}, {"activation": "silu", "gated": True}]


def lost(s: Sketch, tmp_path, options: str, fit=FIT) -> float:
    model, _ = rewrite(s, tmp_path, f"linearize-ffn:{options}", fit=fit)
    return drift(run(s.model(), X), run(model, X))


def numbers(model: Model) -> dict[int, list[np.ndarray]]:
    """Index of a block → the weights of its linears."""
    return {block.index: [linear.weight() for linear in block.linears()] for block in find_ffn_blocks(model)}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_behind_an_affine_one_undo_part_of_its_error(tmp_path, kind):
    s = transformer(4, D, FF, **kind)
    assert lost(s, tmp_path, "blocks=0,refine=0") < 0.9 * lost(s, tmp_path, "blocks=0,heal=false")


def test_down_projections_behind_it_change_and_nothing_else(tmp_path):
    s = transformer(3, D, FF, activation="gelu")
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:blocks=1,refine=0", fit=FIT)
    before = numbers(Model.load(tmp_path / "before.onnx"))
    kept, healed = numbers(model).values()
    assert all(map(np.array_equal, kept, before[0]))
    assert np.array_equal(healed[0], before[2][0])
    assert not np.array_equal(healed[1], before[2][1])
    assert healed[1].shape == before[2][1].shape
    assert (result.fired, result.refused) == (1, [])
    assert any("blocks 2 were fitted anew" in note for note in result.notes)


def test_without_it_all_other_weights_stay(tmp_path):
    s = transformer(3, D, FF, activation="gelu")
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:blocks=0,heal=false", fit=FIT)
    before = numbers(Model.load(tmp_path / "before.onnx"))
    for block, own in zip(numbers(model).values(), (before[1], before[2]), strict=True):
        assert all(map(np.array_equal, block, own))
    assert result.notes == ()


@pytest.mark.parametrize("options", ["blocks=2", "", "blocks=0,target=block"])
def test_there_is_nothing_to_heal_behind_the_last_or_where_no_stream_is_fitted_to(tmp_path, options):
    _, [result] = rewrite(transformer(3, D, FF), tmp_path, f"linearize-ffn:{options}".rstrip(":"), fit=FIT)
    assert result.fired
    assert result.notes == ()


def test_a_refused_block_is_no_reason_to_heal(tmp_path):
    few = feeds_of((1, 2, D), 2, seed=3)
    _, [result] = rewrite(transformer(3, D, FF), tmp_path, "linearize-ffn:blocks=0", fit=few)
    assert (result.fired, result.notes) == (0, ())


def test_weights_with_other_readers_stay(tmp_path):
    """Blocks 1 and 2 are one block that runs twice: a change for one would change the other."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    first = s.op("Add", x, s.ffn(s.norm(x, D)))
    up, down = s.weight(s.numbers(D, FF)), s.weight(s.numbers(FF, D))
    for _ in range(2):
        first = s.op("Add", first, s.op("MatMul", s.op("Relu", s.op("MatMul", s.norm(first, D), up)), down))
    s.op("Identity", first, out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:blocks=0", fit=FIT)
    assert (result.fired, result.notes) == (1, ())
    assert len(numbers(model)) == 2


def fused(s: Sketch, x: str, columns: str) -> str:
    """A gated block whose gate and up are one matrix, one behind the other or in turn."""
    both = s.linear(x, D, 2 * FF)
    if columns == "halves":
        gate, up = f"gate_{both}", f"up_{both}"
        s.op("Split", both, out=[gate, up], axis=-1)
    else:
        last, ends, two = s.weight(np.array([-1])), s.weight(np.array([1 << 60])), s.weight(np.array([2]))
        gate, up = (s.op("Slice", both, s.weight(np.array([start])), ends, last, two) for start in (0, 1))
    return s.linear(s.op("Mul", s.activation("silu", gate), up), FF, D)


def turned(s: Sketch, x: str) -> str:
    """Gemms that read their weights the other way round, on tokens in one row."""
    flat = s.op("Reshape", x, s.weight(np.array([-1, D])))
    up = s.op("Gemm", flat, s.weight(s.numbers(D, FF).T.copy()), s.weight(s.numbers(FF, scale=0.3)), transB=1)
    down = s.weight(s.numbers(FF, D).T.copy())
    y = s.op("Gemm", s.activation("gelu", up), down, s.weight(s.numbers(D, scale=0.3)), transB=1)
    return s.op("Reshape", y, s.op("Shape", x))


def convolved(s: Sketch, x: str) -> str:
    up = s.op("Conv", x, s.weight(s.numbers(D, FF).T[..., None].copy()), s.weight(s.numbers(FF, scale=0.3)))
    down = s.weight(s.numbers(FF, D).T[..., None].copy())
    return s.op("Conv", s.activation("gelu", up), down, s.weight(s.numbers(D, scale=0.3)))


def behind(s: Sketch, x: str) -> str:
    """The bias of the down projection comes when the tokens are no longer in one row."""
    flat = s.op("Reshape", x, s.weight(np.array([-1, D])))
    y = s.linear(s.activation("gelu", s.linear(flat, D, FF)), FF, D, bias=False)
    return s.op("Add", s.op("Reshape", y, s.op("Shape", x)), s.weight(s.numbers(D, scale=0.3)))


FORMS: dict[str, Callable[[Sketch, str], str]] = {
    "plain": lambda s, x: s.ffn(s.norm(x, D), D, FF, activation="gelu"),
    "no bias": lambda s, x: s.ffn(s.norm(x, D), D, FF, activation="silu", gated=True, bias=False),
    "halves": lambda s, x: fused(s, s.norm(x, D), "halves"),
    "turns": lambda s, x: fused(s, s.norm(x, D), "turns"),
    "turned": lambda s, x: turned(s, s.norm(x, D)),
    "behind": lambda s, x: behind(s, s.norm(x, D)),
    "convolved": convolved,
}


def stack(form: str, dtype: type = np.float32) -> Sketch:
    """Three blocks of one form."""
    s = Sketch(dtype=dtype)
    x = s.input("x", ["batch", D, "tokens"] if form == "convolved" else ["batch", "tokens", D])
    for _ in range(3):
        x = s.op("Add", x, FORMS[form](s, x))
    s.op("Identity", x, out=s.output("y"))
    return s


def products(nodes: list[str]) -> int:
    return sum(nodes.count(op) for op in ("MatMul", "Gemm", "Conv"))


def feeds(form: str, count: int, dtype: type = np.float32) -> list[dict[str, np.ndarray]]:
    return feeds_of((8, D, 16) if form == "convolved" else (8, 16, D), count, seed=count, dtype=dtype)


@pytest.mark.parametrize("form", FORMS)
def test_moved_neurons_undo_more_of_it_and_leave_the_graph_as_it_is(tmp_path, form):
    s, [x] = stack(form), feeds(form, 1)
    left, nodes = {}, {}
    for refine in (0, 8):
        model, [result] = rewrite(s, tmp_path, f"linearize-ffn:blocks=0,refine={refine}", fit=feeds(form, 20))
        left[refine], nodes[refine] = drift(run(s.model(), x), run(model, x)), ops(model)
        assert ("neurons of blocks 1-2 were moved" in result.notes[0]) == bool(refine)
    assert left[8] < 0.99 * left[0]
    assert products(nodes[8]) == products(nodes[0])
    before = numbers(Model.load(tmp_path / "before.onnx"))
    for block, own in zip(numbers(model).values(), (before[1], before[2]), strict=True):
        assert [weight.shape for weight in block] == [weight.shape for weight in own]


@pytest.mark.parametrize("form", FORMS)
def test_projections_that_did_not_move_are_those_of_the_block(tmp_path, monkeypatch, form):
    """What is put in lands in the right branch, column for column, bias for bias."""
    def as_they_are(block, start, fit, *others):
        activation = _activation(block)
        assert activation is not None
        return dataclasses.replace(fit, projections=_projections(block, fit, _narrow(block, fit, activation).matrices)), ""

    monkeypatch.setattr(moved, "refined", as_they_are)
    plan = "linearize-ffn:blocks=0"
    still, _ = rewrite(stack(form), tmp_path, f"{plan},refine=0", fit=feeds(form, 20))
    model, [result] = rewrite(stack(form), tmp_path, f"{plan},refine=1", fit=feeds(form, 20))
    assert "were moved" in result.notes[0]
    [x] = feeds(form, 1)
    assert np.abs(run(still, x)["y"] - run(model, x)["y"]).max() < 1e-5


@pytest.mark.parametrize("form", ["plain", "halves", "turns", "turned", "convolved"])
def test_a_bias_that_moved_is_written(tmp_path, monkeypatch, form):
    def pushed(block, start, fit, *others):
        activation = _activation(block)
        assert activation is not None
        projections = _projections(block, fit, _narrow(block, fit, activation).matrices)
        return dataclasses.replace(fit, projections=tuple((matrix, bias + push(number))
                                                          for number, (matrix, bias) in enumerate(projections))), ""

    def push(number: int) -> np.ndarray:
        return (1 + number) * np.linspace(0.1, 0.2, FF)

    monkeypatch.setattr(moved, "refined", pushed)
    model, _ = rewrite(stack(form), tmp_path, "linearize-ffn:blocks=0,refine=1", fit=feeds(form, 20))
    for block, own in zip(find_ffn_blocks(model), find_ffn_blocks(Model.load(tmp_path / "before.onnx"))[1:], strict=True):
        for number, (leaf, before) in enumerate(zip(block.region.leaves, own.region.leaves, strict=True)):
            columns = slice(None) if leaf.columns is None else leaf.columns
            moved_by = leaf.linear.bias()[columns] - before.linear.bias()[columns]
            assert moved_by == pytest.approx(push(number), abs=1e-6)


def test_a_descent_that_is_not_better_moves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(refinement, "_descend", lambda *arguments: True)
    model, [result] = rewrite(transformer(3, D, FF, activation="gelu"), tmp_path, "linearize-ffn:blocks=0", fit=FIT)
    before = numbers(Model.load(tmp_path / "before.onnx"))
    for block, own in zip(numbers(model).values(), (before[1], before[2]), strict=True):
        assert np.array_equal(block[0], own[0])
        assert not np.array_equal(block[1], own[1])
    assert "fitted anew" in result.notes[0]
    assert "moved" not in result.notes[0]


def test_half_precision(tmp_path):
    s, [x] = stack("no bias", np.float16), feeds("no bias", 1, np.float16)
    left = {}
    for refine in (0, 8):
        model, _ = rewrite(s, tmp_path, f"linearize-ffn:blocks=0,refine={refine}", fit=feeds("no bias", 20, np.float16))
        assert {weight.dtype for block in numbers(model).values() for weight in block} == {np.dtype(np.float16)}
        left[refine] = drift(run(s.model(), x), run(model, x))
    assert left[8] < 0.99 * left[0]


def shown(where: str) -> Sketch:
    """Of block 1 something else reads the up projection's weight, or what it gives."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    first = s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu"))
    weight = s.weight(s.numbers(D, FF))
    up = s.op("MatMul", s.norm(first, D), weight)
    hidden = s.activation("gelu", up)
    if where == "weight":
        s.op("MatMul", x, weight, out=s.output("other"))
    else:
        s.op("Neg", {"up": up, "hidden": hidden}[where], out=s.output("other"))
    s.op("Add", first, s.linear(hidden, FF, D), out=s.output("y"))
    return s


@pytest.mark.parametrize("where", ["weight", "up", "hidden"])
def test_projections_that_something_else_reads_stay(tmp_path, where):
    model, [result] = rewrite(shown(where), tmp_path, "linearize-ffn:blocks=0,refine=2", fit=FIT)
    before, [healed] = numbers(Model.load(tmp_path / "before.onnx"))[1], numbers(model).values()
    assert np.array_equal(healed[0], before[0])
    assert not np.array_equal(healed[1], before[1])
    assert "moved" not in result.notes[0]


def test_columns_that_another_block_reads_stay(tmp_path):
    """One product gives what the block reads, and beside it something for the output."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    first = s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu"))
    s.op("Split", s.linear(s.norm(first, D), D, FF + 4), s.weight(np.array([FF, 4])), out=["up", "rest"], axis=-1)
    s.op("Identity", "rest", out=s.output("other"))
    s.op("Add", first, s.linear(s.activation("gelu", "up"), FF, D), out=s.output("y"))
    _, [result] = rewrite(s, tmp_path, "linearize-ffn:blocks=0,refine=2", fit=FIT)
    assert (result.fired, "moved" in result.notes[0]) == (1, False)


def test_less_than_no_descent(tmp_path):
    with pytest.raises(InputError, match="refine=-1"):
        rewrite(transformer(2), tmp_path, "linearize-ffn:refine=-1", fit=FIT)


def test_weights_with_an_axis_for_experts_stay(tmp_path):
    """Though there is one expert: its matrices are no matrices."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    first = s.op("Add", x, s.ffn(s.norm(x, D), D, FF))
    hidden = s.activation("gelu", s.op("MatMul", s.norm(first, D), s.weight(s.numbers(D, FF)[None])))
    s.op("Add", first, s.op("MatMul", hidden, s.weight(s.numbers(FF, D)[None])), out=s.output("y"))
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:blocks=0", fit=FIT)
    assert (result.fired, result.notes) == (1, ())
    [block], before = numbers(model).values(), numbers(Model.load(tmp_path / "before.onnx"))[1]
    assert all(map(np.array_equal, block, before))


def test_integer_weights_stay(tmp_path):
    s = transformer(3, D, FF, activation="gelu")
    (tmp_path / "first").mkdir()
    whole, _ = rewrite(s, tmp_path / "first", "quantize-ffn:blocks=2", fit=FIT)
    model, [_, result] = rewrite(s, tmp_path, "quantize-ffn:blocks=2", "linearize-ffn:blocks=0", fit=FIT)
    assert "down projections of blocks 1 were fitted anew" in result.notes[0]
    assert all(map(np.array_equal, numbers(model)[1], numbers(whole)[2]))
