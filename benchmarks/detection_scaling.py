"""How the time to load, search and save grows with the number of nodes: transformers of more and more layers, also shuffled.

    python benchmarks/detection_scaling.py [--nodes 1000 2000 5000 10000 20000] [--json FILE]

Each size is one model of stacked pre-norm layers (LayerNormalization, up, GELU in pieces, down, residual Add), small matrices so
that nodes are what counts; the best of three runs. Linear means that seconds per node stay the same: exit code 1 where they grow
more than twofold from the smallest size to the largest.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ffnfold
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

D, FF, NODES_OF_A_LAYER = 8, 32, 11


def stacked(nodes: int) -> onnx.ModelProto:
    """A model of about ``nodes`` nodes."""
    generator = np.random.default_rng(0)
    made: list[onnx.NodeProto] = []
    weights: list[TensorProto] = [numpy_helper.from_array(np.asarray(value, np.float32), name)
                                  for name, value in (("root", np.sqrt(2)), ("one", 1), ("half", 0.5))]

    def weight(name: str, *shape: int) -> str:
        weights.append(numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name))
        return name

    def op(kind: str, *inputs: str) -> str:
        output = f"value_{len(made)}"
        made.append(helper.make_node(kind, list(inputs), [output], name=f"/{kind}_{len(made)}"))
        return output

    stream = "x"
    for layer in range(max(1, nodes // NODES_OF_A_LAYER)):
        x = op("LayerNormalization", stream, weight(f"{layer}.scale", D), weight(f"{layer}.shift", D))
        up = op("Add", op("MatMul", x, weight(f"{layer}.up", D, FF)), weight(f"{layer}.up_bias", FF))
        erf = op("Add", op("Erf", op("Div", up, "root")), "one")
        hidden = op("Mul", op("Mul", up, erf), "half")
        down = op("Add", op("MatMul", hidden, weight(f"{layer}.down", FF, D)), weight(f"{layer}.down_bias", D))
        stream = op("Add", stream, down)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", D]) for name in ("x", stream)]
    graph = helper.make_graph(made, "stacked", value[:1], value[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of three, and what came out."""
    best, result = float("inf"), None
    for _ in range(3):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return best, result


def measure(model: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """One row."""
    path, out = folder / "model.onnx", folder / "out.onnx"
    onnx.save_model(model, path)
    load, loaded = timed(lambda: ffnfold.load(path))
    search, blocks = timed(lambda: ffnfold.find_ffn_blocks(loaded))

    def rewrite_and_save() -> None:
        fresh = ffnfold.load(path)
        ffnfold.optimize(fresh, ["remove-ffn:keep=nothing,blocks=0"])
        fresh.save(out)

    save, _ = timed(lambda: loaded.save(out))
    start = time.perf_counter()
    rewrite_and_save()
    return {"nodes": len(model.graph.node), "blocks": len(blocks), "load": load, "search": search, "save": save,
            "rewrite_one_and_save": time.perf_counter() - start}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 2000, 5000, 10000, 20000])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| nodes | order | blocks | load | search | save | rewrite one block and save | µs a node |\n" + "| --- " * 8 + "|")
    for order in ("stacked", "shuffled"):
        for nodes in arguments.nodes:
            model = stacked(nodes)
            if order == "shuffled":
                mixed = list(model.graph.node)
                random.Random(0).shuffle(mixed)
                del model.graph.node[:]
                model.graph.node.extend(mixed)
            with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
                row = {"order": order, **measure(model, Path(folder))}
            row["microseconds_a_node"] = 1e6 * (row["load"] + row["search"] + row["save"]) / row["nodes"]
            rows.append(row)
            seconds = " | ".join(f"{row[key]:.2f} s" for key in ("load", "search", "save", "rewrite_one_and_save"))
            print(f"| {row['nodes']} | {order} | {row['blocks']} | {seconds} | {row['microseconds_a_node']:.0f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    growth = [found[-1] / found[0] for found in ([row["microseconds_a_node"] for row in rows if row["order"] == order]
                                                 for order in ("stacked", "shuffled"))]
    print(f"seconds a node, largest over smallest: {growth[0]:.2f} stacked, {growth[1]:.2f} shuffled")
    return 1 if max(growth) > 2 else 0


if __name__ == "__main__":
    sys.exit(main())
