"""Is ONNX Runtime faster when a Resize is two products? Images of several sizes, raced on the CPU.

    python benchmarks/separate_resize.py [--seconds S] [--threads N] [--json FILE]

Each case is one cubic Resize. Its sizes are constants, or an input (as where a graph computes them). ``separate-resize``
rewrites it, and the two are raced in one process, their runs interleaved. Prints the speed-up (above 1: two products are faster)
with its 95 % interval. Cases that the pass leaves alone, linear interpolation and ``antialias`` among them, are rewritten all the
same, so that its limits can be read off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from ffnfold.graph.model import Model
from ffnfold.passes.exact import resized
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, race
from onnx import TensorProto, helper

CHANNELS = (2, 8, 16, 384)
EDGES = ((14, 7), (14, 28), (37, 16), (37, 37), (37, 64), (128, 64))
LARGE = ((3, 512, 224), (3, 1024, 224), (8, 1024, 64), (64, 128, 4))
OTHERS = ({"mode": "linear"}, {"mode": "cubic", "antialias": 1}, {"mode": "linear", "antialias": 1})


def main() -> None:
    """Race every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "separate_resize.json")
    arguments = parser.parse_args()
    shapes = [*((channels, *edges) for channels in CHANNELS for edges in EDGES), *LARGE]
    cases = [(shape, computed, {"mode": "cubic"}) for shape in shapes for computed in (False, True)]
    cases += [((channels, *edges), False, attrs) for attrs in OTHERS for channels in (8, 384)
              for edges in EDGES if edges[0] != edges[1]]
    rows = []
    machine: dict[str, Any] = {}
    for (channels, before, after), computed, attrs in cases:
        if before == after and not computed:
            continue
        fires, result = measure((channels, before, after), computed, attrs, arguments.threads, arguments.seconds)
        machine = {key: value for key, value in result["machine"].items() if key not in ("rounds", "feeds")}
        rows.append({"mode": attrs["mode"], "antialias": attrs.get("antialias", 0),
                     "sizes": "computed" if computed else "constant",
                     "channels": channels, "before": before, "after": after, "fires": fires,
                     "ms": [model["p50_ms"] for model in result["models"]],
                     **{key: result["ratios"][0][key] for key in ("speedup", "low", "high")}})
        print("{mode:6} antialias={antialias} {sizes:8} {channels:4} × {before:4}² → {after:3}² {speedup:6.2f}× ({low:.2f} to "
              "{high:.2f}){note}".format(**rows[-1], note="" if fires else "  left alone"), flush=True)
    arguments.json.write_text(json.dumps({"machine": machine, "cases": rows}, indent=1) + "\n")


def measure(shape: tuple[int, int, int], computed: bool, attrs: dict[str, Any], threads: int,
            seconds: float) -> tuple[bool, dict[str, Any]]:
    """Whether the pass fires, and ``bench``'s object of the Resize as it is and as two products."""
    channels, edge, wanted = shape
    feed = {"x": np.random.default_rng(1).standard_normal((1, channels, edge, edge)).astype(np.float32)}
    if computed:
        feed["sizes"] = np.asarray([1, channels, wanted, wanted])
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        onnx.save_model(resize(shape, computed, {**attrs, "mode": "cubic"}), before)
        [result] = run_plan(Model.load(before), Plan.parse(["separate-resize"]))
        model = Model.load(before)
        with patch.object(resized, "_by_cost", lambda *given: None), patch.object(resized, "_by_attributes", lambda *given: None):
            run_plan(model, Plan.parse(["separate-resize"]))
        for node in model.graph.nodes:
            if node.op == "Resize":
                node.attrs["mode"] = attrs["mode"]
        onnx.save_model(resize(shape, computed, attrs), before)
        onnx.save_model(model.to_proto()[0], after)
        fires = bool(result.fired) and attrs["mode"] == "cubic"
        return fires, race([before, after], Feeds([lambda: feed]), threads=threads, seconds=seconds)


def resize(shape: tuple[int, int, int], computed: bool, attrs: dict[str, Any]) -> onnx.ModelProto:
    """One Resize of ``[1, channels, edge, edge]``."""
    channels, edge, wanted = shape
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **attrs)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, edge, edge])]
    given = [] if computed else [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, channels, wanted, wanted])]
    if computed:
        inputs.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)]
    graph = helper.make_graph([node], "resize", inputs, outputs, given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


if __name__ == "__main__":
    main()
