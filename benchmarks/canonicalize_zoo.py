"""canonicalize-ffn on a folder of exported graphs: every block re-emitted, the same outputs, nothing more to execute.

    python benchmarks/canonicalize_zoo.py FOLDER [--only TEXT] [--json FILE]

FOLDER holds NAME.onnx, NAME.npz (``in:INPUT`` and ``out:OUTPUT``, recorded with ONNX Runtime on that file) and truth.json,
whose entries say which files are ``lossy``. Files that are lossy only by being in float16 are taken too, and counted apart.

Two plans: ``canonicalize-ffn:all=true``, which re-emits every block from its weights, and ``canonicalize-ffn``, which leaves
alone what is canonical already. Checked on every file and plan: the outputs are those recorded, within 1e-4 of the largest number
(3e-3 in float16); ONNX Runtime executes no more nodes than before; the file is no larger; the blocks found afterwards are the
blocks found before. Printed: the share of blocks re-emitted, and for the others the reason, by variant. Exit code 1 if a file
fails, or under 98 % of the blocks of the files that are not lossy are re-emitted by the first plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.graph.store import read_model
from ffnfold.passes.base import PassResult
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import open_session
from ffnfold.runtime.agreement import disagreement, largest_difference
from ffnfold.runtime.executed import executed_ops

TOLERANCE, TOLERANCE_FLOAT16 = 1e-4, 3e-3
GOAL = 0.98
PLANS = ("canonicalize-ffn:all=true", "canonicalize-ffn")
_BOOKKEEPING = 2048  # bytes for names and metadata


def main() -> int:
    """Run every file and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "canonicalize_zoo.json")
    arguments = parser.parse_args()
    truth = json.loads((arguments.folder / "truth.json").read_text())
    started = time.time()
    reports: dict[str, Any] = {}
    for plan in PLANS:
        results = []
        for path in sorted(arguments.folder.glob("*.onnx")):
            entry = truth.get(path.name)
            half = entry is not None and "fp16" in entry["variant"]
            if entry is None or arguments.only not in path.name or (entry["lossy"] and not half):
                continue
            result = {"file": path.name, "variant": entry["variant"], "float16": half, **judge(path, plan, half)}
            results.append(result)
            for reason in result["wrong"]:
                print(f"WRONG {plan} on {path.name}: {reason}", flush=True)
        reports[plan] = summary(results)
        print(plan, json.dumps({key: value for key, value in reports[plan].items() if key != "files"}, indent=1), flush=True)
    print(f"{time.time() - started:.0f} s")
    if not arguments.only:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    short = reports[PLANS[0]]["share"] < GOAL
    return 1 if short or any(report["wrong"] for report in reports.values()) else 0


def judge(path: Path, plan: str, half: bool) -> dict[str, Any]:
    """What the plan did to one file, and what is wrong with that."""
    try:
        return _judge(path, plan, TOLERANCE_FLOAT16 if half else TOLERANCE)
    except Exception as error:
        return {"wrong": [f"{type(error).__name__}: {error}"[:400]]}


def _judge(path: Path, plan: str, tolerance: float) -> dict[str, Any]:
    model = Model.load(path)
    blocks = _blocks(model)
    [result] = run_plan(model, Plan.parse([plan]), threads=1)
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        after = Path(folder) / path.name
        model.save(after)
        sizes = read_model(path).nbytes, read_model(after).nbytes
        executed = [sum(executed_ops(each, threads=1).values()) for each in (path, after)]
        wrong = []
        if _blocks(Model.load(after)) != blocks:
            wrong.append("other blocks are found afterwards")
        feed, expected = recorded(path)
        outputs = open_session(after, threads=1).run(feed, list(expected))
    reason = disagreement(expected, outputs)
    difference = None if reason else largest_difference(expected, outputs)
    if reason:
        wrong.append(reason)
    if difference is not None and difference > tolerance:
        wrong.append(f"outputs moved by {difference:.1e}")
    if executed[1] > executed[0]:
        wrong.append(f"executes {executed[1]} nodes, {executed[0]} before")
    if sizes[1] > sizes[0] + _BOOKKEEPING:
        wrong.append(f"the file grew from {sizes[0]} to {sizes[1]} bytes")
    return {"blocks": len(blocks), "re_emitted": result.fired, "refused": _reasons(result), "executed": executed,
            "bytes": sizes, "difference": difference, "wrong": wrong}


def _blocks(model: Model) -> list[tuple[object, ...]]:
    return sorted((block.path, block.d_model, block.d_ff, block.d_out, block.gated, block.activation.name)
                  for block in find_ffn_blocks(model))


def _reasons(result: PassResult) -> list[str]:
    return [refused.reason for refused in result.refused]


def recorded(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs kept beside a model."""
    with np.load(path.with_suffix(".npz")) as held:
        return ({name[3:]: held[name] for name in held.files if name.startswith("in:")},
                {name[4:]: held[name] for name in held.files if name.startswith("out:")})


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts over all files, and the files."""
    ran = [result for result in results if "blocks" in result]
    exact = [result for result in ran if not result["float16"]]
    half = [result for result in ran if result["float16"]]
    blocks, fired = (sum(result[key] for result in exact) for key in ("blocks", "re_emitted"))
    refused = Counter(f"{result['variant']}: {reason}" for result in ran for reason in result["refused"])
    return {"tolerance": TOLERANCE, "tolerance_float16": TOLERANCE_FLOAT16, "files": results,
            "files_not_lossy": len(exact), "blocks": blocks, "re_emitted": fired, "share": fired / max(blocks, 1),
            "left_as_they_were": blocks - fired - sum(len(result["refused"]) for result in exact),
            "files_float16": len(half), "blocks_float16": sum(result["blocks"] for result in half),
            "re_emitted_float16": sum(result["re_emitted"] for result in half), "refused": refused,
            "largest_difference": max((result["difference"] or 0 for result in exact), default=0.0),
            "largest_difference_float16": max((result["difference"] or 0 for result in half), default=0.0),
            "more_nodes": sum(result["executed"][1] > result["executed"][0] for result in ran),
            "fewer_nodes": sum(result["executed"][1] < result["executed"][0] for result in ran),
            "wrong": {result["file"]: result["wrong"] for result in results if result["wrong"]}}


if __name__ == "__main__":
    sys.exit(main())
