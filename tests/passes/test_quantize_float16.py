"""A float16 model whose FFN blocks multiply in integers: where its blocks begin and end, and passes that come later."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, run
from ffnfold.graph.ffn import find_ffn_blocks
from onnx import TensorProto
from rewriting import feeds_of, rewrite

D, FF = 64, 256
SHAPE = ["rows", D]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("options", ["", ":row_scale=true", ":row_scale=false", ":form=nbits", ":form=weight-only"])
def test_float16_blocks_keep_their_edges(tmp_path, options, gated):
    """Integer products give float32; the Casts around them are theirs."""
    s = Sketch(dtype=np.float16)
    x = s.input("x", SHAPE)
    for _ in range(2):
        x = s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="silu", gated=gated))
    s.op("Identity", x, out=s.output("y", SHAPE))
    before = [(block.input.name, block.output.name) for block in find_ffn_blocks(rewrite(s, tmp_path)[0])]
    model, _ = rewrite(s, tmp_path, f"quantize-ffn{options}")
    blocks = find_ffn_blocks(model)
    assert [(block.input.name, block.output.name) for block in blocks] == before
    assert {(block.onnx_type, block.quantized) for block in blocks} == {(TensorProto.FLOAT16, True)}
    _, results = rewrite(s, tmp_path, f"quantize-ffn{options}", "remove-ffn:keep=nothing")
    assert [each.fired for each in results] == [2, 2]
    feed = feeds_of([4, D], dtype=np.float16)[0]
    assert np.array_equal(run(tmp_path / "after.onnx", feed)["y"], feed["x"])


def test_a_float16_block_is_fitted_after_it_was_quantized(tmp_path):
    s = Sketch(dtype=np.float16)
    x = s.input("x", SHAPE)
    s.op("Add", x, s.ffn(x, D, FF), out=s.output("y", SHAPE))
    _, results = rewrite(s, tmp_path, "quantize-ffn", "remove-ffn:keep=mean", fit=feeds_of([64, D], dtype=np.float16))
    assert [each.fired for each in results] == [1, 1]
