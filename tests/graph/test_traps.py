"""Exported graphs (``python -m ffnfold.models.trap_graphs tests/data``): what is a block, and what only looks like one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ffn_graphs import drift, run
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan

DATA = Path(__file__).parents[1] / "data"
GELU = ("gelu", False, True)
BLOCKS = {"pre_norm_gelu": [GELU, GELU], "post_norm_relu": [("relu", False, True)] * 2,
          "tanh_gelu_no_bias": [("gelu_tanh", False, False)],
          "fused_gate_up": [("silu", True, False)], "lm_head": [GELU], "pooler": [GELU],
          "gated_attention": [("silu", False, True)],
          "squeeze_excite": [GELU]}
"""Activation, gated, biases of each block."""
every_file = pytest.mark.parametrize("file", [f"{name}__{exporter}" for name in BLOCKS for exporter in ("ts", "dyn")])


@every_file
def test_its_blocks_and_no_others(file):
    blocks = find_ffn_blocks(Model.load(DATA / f"{file}.onnx"))
    assert [(block.activation.name, block.gated, block.down_bias) for block in blocks] == BLOCKS[file.split("__")[0]]
    assert {(block.d_model, block.d_ff, block.d_out) for block in blocks} == {(16, 48, 16)}
    assert all(rejection.reason and rejection.value for rejection in blocks.rejected)


@every_file
def test_re_emitted_it_computes_the_same(tmp_path, file):
    path = DATA / f"{file}.onnx"
    model = Model.load(path)
    [result] = run_plan(model, Plan.parse(["canonicalize-ffn:all=true"]), threads=1)
    assert result.fired == len(BLOCKS[file.split("__")[0]])
    feed = {"x": np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)}
    assert drift(run(path, feed), run(model, feed)) < 1e-5


def test_every_file_has_its_line():
    assert {path.stem.split("__")[0] for path in DATA.glob("*.onnx")} == set(BLOCKS)
