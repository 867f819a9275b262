"""Is ONNX Runtime faster when linears that read the same value are one? Layers of sample-model shapes, raced.

    python benchmarks/merge_linears.py [--seconds S] [--threads N] [--json FILE]

Each case is four layers of attention (Q, K and V) or of a gated FFN (gate and up) with random weights in the shapes of a
sample model, at several numbers of tokens. ``merge-linears:force=true`` rewrites it, and the two are raced in one process,
their runs interleaved. Prints the speed-up (above 1: merged is faster) with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, race
from onnx import helper, numpy_helper

LAYERS = 4
SHAPES = {"MiniLM, ViT-S: Q, K, V": (384, (384, 384, 384), True), "Gemma 3 270M: Q, K, V": (640, (1024, 256, 256), False),
          "Gemma 3 270M: gate, up": (640, (2048, 2048), False)}
TOKENS = ((1, 1), (1, 16), (1, 128), (8, 128))


def main() -> None:
    """Race every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "merge_linears.json")
    arguments = parser.parse_args()
    rows = []
    machine: dict[str, Any] = {}
    for name, (d_model, widths, bias) in SHAPES.items():
        for shape in TOKENS:
            result = measure(d_model, widths, bias, shape, arguments.threads, arguments.seconds)
            machine = {key: value for key, value in result["machine"].items() if key not in ("rounds", "feeds")}
            rows.append({"linears": name, "batch": shape[0], "tokens": shape[1], "rounds": result["machine"]["rounds"],
                         **{key: result["ratios"][0][key] for key in ("speedup", "low", "high")}})
            print("{linears:24} {batch} × {tokens:<4} merged {speedup:.3f}× ({low:.3f} to {high:.3f}, {rounds} rounds)".format(
                **rows[-1]), flush=True)
    faster = [row for row in rows if row["low"] > 1]
    slower = [row for row in rows if row["high"] < 1]
    print(f"faster in {len(faster)} of {len(rows)} cases, slower in {len(slower)}")
    arguments.json.write_text(json.dumps({"machine": machine, "cases": rows}, indent=1) + "\n")


def measure(d_model: int, widths: tuple[int, ...], bias: bool, shape: tuple[int, int], threads: int,
            seconds: float) -> dict[str, Any]:
    """``bench``'s object of the layers as they are and merged."""
    x = np.random.default_rng(1).standard_normal((*shape, d_model)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save_model(layers(d_model, widths, bias), before)
        model = Model.load(before)
        [result] = run_plan(model, Plan.parse(["merge-linears:force=true"]))
        if result.fired != LAYERS:
            raise SystemExit(f"merged {result.fired} of {LAYERS} layers: {result.refused}")
        model.save(after)
        return race([before, after], Feeds([lambda: {"x": x}]), threads=threads, seconds=seconds)


def layers(d_model: int, widths: tuple[int, ...], bias: bool) -> onnx.ModelProto:
    """``LAYERS`` layers that keep the width: attention for three widths, a gated FFN for two."""
    parts = _Parts(np.random.default_rng(0))
    x = "x"
    for _ in range(LAYERS):
        normed = parts.node("LayerNormalization", x, parts.weight(np.ones(d_model, np.float32)), axis=-1)
        values = [parts.linear(normed, d_model, width, bias) for width in widths]
        mixed, width = (parts.attention(values, widths), widths[0]) if len(widths) == 3 else (parts.gate(values), widths[0])
        x = parts.node("Add", x, parts.linear(mixed, width, d_model, bias))
    parts.nodes.append(helper.make_node("Identity", [x], ["y"]))
    kind = onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, ["batch", "tokens", d_model]) for name in "xy"]
    graph = helper.make_graph(parts.nodes, "layers", ends[:1], ends[1:], parts.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


class _Parts:
    """Nodes and weights of a graph in the making."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def weight(self, array: Any) -> str:
        self.initializers.append(numpy_helper.from_array(array, f"weight_{len(self.initializers)}"))
        return self.initializers[-1].name

    def node(self, op: str, *inputs: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{op}_{len(self.nodes)}"], **attrs))
        return self.nodes[-1].output[0]

    def linear(self, x: str, d_in: int, d_out: int, bias: bool) -> str:
        matrix = self.random.standard_normal((d_in, d_out)).astype(np.float32) / np.float32(np.sqrt(d_in))
        y = self.node("MatMul", x, self.weight(matrix))
        return self.node("Add", y, self.weight(self.random.standard_normal(d_out).astype(np.float32))) if bias else y

    def gate(self, values: list[str]) -> str:
        return self.node("Mul", self.node("Gelu", values[0], approximate="tanh"), values[1])

    def attention(self, values: list[str], widths: tuple[int, ...], size: int = 64) -> str:
        """Softmax attention with heads of ``size``; keys and values are repeated where there are fewer of them."""
        query, key, value = (self.node("Reshape", each, self.weight(np.asarray([0, 0, width // size, size])))
                             for each, width in zip(values, widths, strict=True))
        query, value = (self.node("Transpose", each, perm=[0, 2, 1, 3]) for each in (query, value))
        key = self.node("Transpose", key, perm=[0, 2, 3, 1])
        if widths[1] != widths[0]:
            repeat = self.weight(np.asarray([1, widths[0] // widths[1], 1, 1]))
            key, value = (self.node("Tile", each, repeat) for each in (key, value))
        weights = self.node("Softmax", self.node("MatMul", query, key), axis=-1)
        heads = self.node("Transpose", self.node("MatMul", weights, value), perm=[0, 2, 1, 3])
        return self.node("Reshape", heads, self.weight(np.asarray([0, 0, widths[0]])))


if __name__ == "__main__":
    main()
