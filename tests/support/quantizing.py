"""Sketches quantized by quantize-ffn, and what became of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from ffn_graphs import Sketch, drift, optimized_ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds

D, FF = 64, 256
RANDOM = np.random.default_rng(7)
X = {"x": RANDOM.normal(size=(2, 16, D)).astype(np.float32)}


def quantize(s: Sketch, folder: Path, options: str = "", fit: Feeds | None = None) -> tuple[Model, PassResult]:
    """The quantized model, as it is read from the file it was saved to."""
    onnx.save_model(s.model(), folder / "model.onnx")
    model = Model.load(folder / "model.onnx")
    [result] = run_plan(model, Plan.parse(["quantize-ffn" + (options and f":{options}")]), fit=fit, threads=1)
    model.save(folder / "quantized.onnx")
    return Model.load(folder / "quantized.onnx"), result


def executed(folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime runs of the quantized model, after its fusions."""
    return Counter(optimized_ops(folder / "quantized.onnx", folder))


def lost(s: Sketch, folder: Path, options: str = "", fit: Feeds | None = None, feed=X) -> float:
    """Drift of the outputs on ``feed``."""
    model, result = quantize(s, folder, options, fit)
    assert result.fired
    return drift(run(s.model(), feed), run(model, feed))


def post_norm(blocks: int = 1, scale: np.ndarray | None = None, **kind) -> Sketch:
    """Blocks on a stream that a LayerNorm gives: ``y = norm(x + ffn(x))``, as in BERT."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    scale = np.ones(D, np.float32) if scale is None else scale
    for number in range(blocks + 1):
        x = s.op("LayerNormalization", x, s.weight(scale), s.weight(s.numbers(D, scale=0.1)), axis=-1)
        if number < blocks:
            x = s.op("Add", x, s.ffn(x, D, FF, name=f"/layer.{number}/ffn", **kind))
    s.op("Identity", x, out=s.output("y", ["batch", "tokens", D]))
    return s
