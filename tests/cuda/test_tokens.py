"""Exact passes about tokens and images, on CUDA: the same outputs, and where they do not fire."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import open_session
from headed_attention import D, Heads
from masked_encoders import encoder, feed_of

TOLERANCE = {"float32": 1e-4, "float16": 2e-2}


@pytest.mark.cuda
@pytest.mark.parametrize("mask", [[[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], [[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]]])
def test_padding_is_skipped(tmp_path, provider, dtype, mask):
    model = Model.load(encoder(dtype=dtype).save(tmp_path / "model.onnx"))
    [result] = run_plan(model, Plan.parse(["skip-padding"]), provider=provider)
    assert result.fired == 12, result.refused
    given = feed_of(mask)
    before, after = (open_session(each, provider=provider).run(given) for each in (tmp_path / "model.onnx", model))
    kept = np.asarray(mask) != 0
    for found in (before, after):
        found["y"] = found["y"][kept]
    assert drift(before, after) < TOLERANCE[dtype.name]


@pytest.mark.cuda
def test_attention_is_fused(tmp_path, provider, dtype):
    model = Model.load(Heads(dtype=dtype).build().save(tmp_path / "model.onnx"))
    [result] = run_plan(model, Plan.parse(["fuse-attention"]), provider=provider)
    assert result.fired == 1, result.refused
    given = {"x": np.random.default_rng(0).normal(size=(2, 16, D)).astype(dtype)}
    before, after = (open_session(each, provider=provider).run(given) for each in (tmp_path / "model.onnx", model))
    assert drift(before, after) < TOLERANCE[dtype.name]


@pytest.mark.cuda
def test_images_are_resized_as_they_were(tmp_path, provider):
    s = Sketch()
    x, size = s.input("x", [1, 8, 9, 9]), s.weight(np.asarray([1, 8, 4, 20], np.int64))
    s.op("Resize", x, "", "", size, out=s.output("y", None), mode="cubic")
    model = Model.load(s.save(tmp_path / "model.onnx"))
    [result] = run_plan(model, Plan.parse(["separate-resize"]), provider=provider)
    assert result.fired == (0 if provider == "cuda" else 1)
