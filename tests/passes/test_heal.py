"""Healing: blocks that stay make good what affine blocks before them do wrong, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
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
    assert lost(s, tmp_path, "blocks=0") < 0.9 * lost(s, tmp_path, "blocks=0,heal=false")


def test_down_projections_behind_it_change_and_nothing_else(tmp_path):
    s = transformer(3, D, FF, activation="gelu")
    model, [result] = rewrite(s, tmp_path, "linearize-ffn:blocks=1", fit=FIT)
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
