"""Constants that are also inputs of the graph: what is fitted to their defaults must not take their place."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from rewriting import feeds_of, rewrite

D, FF = 8, 32
FIT = feeds_of((4, 8, D), 10, seed=11)
SHAPES = {"up": [D, FF], "up bias": [FF], "down": [FF, D], "down bias": [D]}
fitting = pytest.mark.parametrize("plan", [
    "linearize-ffn", "linearize-ffn:fit=stein", "linearize-ffn:fit=neuron", "slim-ffn:multiple=1,refine=0", "factorize-ffn",
    "factorize-ffn:whiten=false", "sparsify-ffn", "bilinear-ffn", "share-ffn", "split-ffn:multiple=1", "prune-skip:fit=slim",
    "remove-ffn", *(f"remove-ffn:keep={keep}" for keep in ("scale", "rank", "affine", "ladder")),
    "remove-ffn:keep=nothing,within=100"])


def overridable(which: str, blocks: int = 1) -> Sketch:
    """One constant of the first block is also an input."""
    s = transformer(blocks, activation="gelu", pre_norm=False)
    name = next(name for name, weight in s.initializers.items() if list(weight.dims) == SHAPES[which])
    s.input(name, SHAPES[which])
    return s


@fitting
@pytest.mark.parametrize("which", list(SHAPES))
def test_nothing_fitted_takes_the_place_of_what_may_be_overridden(tmp_path, plan, which):
    s = overridable(which)
    model, [result] = rewrite(s, tmp_path, plan, fit=FIT)
    assert (result.fired, [each.reason for each in result.refused]) == (0, ["a weight is an input that the caller may override"])
    other = {**FIT[0], s.inputs[-1].name: np.full(SHAPES[which], 0.3, np.float32)}
    assert drift(run(s.model(), FIT[0]), run(s.model(), other)) > 0.01
    assert drift(run(s.model(), other), run(model, other)) < 1e-6


def test_a_block_may_be_taken_out_whatever_its_weights_are(tmp_path):
    model, [result] = rewrite(overridable("up"), tmp_path, "remove-ffn:keep=nothing")
    assert result.fired == 1
    np.testing.assert_array_equal(run(model, FIT[0])["y"], FIT[0]["x"])


@pytest.mark.parametrize("which", list(SHAPES))
def test_a_block_says_whether_anything_in_it_may_be_overridden(tmp_path, which):
    overridable(which, blocks=2).save(tmp_path / "model.onnx")
    assert [block.overridable for block in find_ffn_blocks(Model.load(tmp_path / "model.onnx"))] == [True, False]
