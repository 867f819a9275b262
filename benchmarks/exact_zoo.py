"""The exact plan on a folder of exported graphs: the same outputs, and nothing more to execute.

    python benchmarks/exact_zoo.py FOLDER [--only TEXT] [--plan NAME+NAME...] [--json FILE]

FOLDER holds NAME.onnx, NAME.npz (its inputs, as ``in:INPUT``) and truth.json, whose entries say which files are ``lossy``
(made inexact on purpose, by quantization: a rounding error may there become a step of the quantizer). Checked on every file:
ONNX Runtime runs it after if it does before; the file is no larger; after ONNX Runtime's own optimizations it executes no more
nodes than before. On files that are not lossy: outputs within 1e-4 (type and shape too), on the file's inputs and on
adversarial ones made from them. Exit code 1 if a file fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.graph.store import read_model
from ffnfold.passes.plan import EXACT_PLAN, Plan
from ffnfold.passes.proof.equivalence import Equivalence, equivalence
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, open_session

TOLERANCE = 1e-4


def main() -> int:
    """Run every file and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--plan", default="+".join(EXACT_PLAN), help="passes to run instead of the exact plan")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "exact_zoo.json")
    arguments = parser.parse_args()
    truth = json.loads((arguments.folder / "truth.json").read_text())
    started = time.time()
    results = []
    for path in sorted(arguments.folder.glob("*.onnx")):
        if arguments.only in path.stem and path.name in truth:
            result = {"file": path.name, "lossy": bool(truth[path.name]["lossy"]), **judge(path, arguments.plan.split("+"))}
            results.append(result)
            for reason in result.get("wrong", []):
                if not (result["lossy"] and reason.startswith("moved")):
                    print(f"WRONG {path.name}: {reason}", flush=True)
    report = summary(results)
    print(json.dumps({key: value for key, value in report.items() if key != "files"}, indent=1))
    print(f"{time.time() - started:.0f} s")
    if not arguments.only and arguments.plan == "+".join(EXACT_PLAN):
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["wrong"] else 0


def judge(path: Path, plan: list[str]) -> dict[str, Any]:
    """What the plan did to one file, and what is wrong with that."""
    try:
        model = Model.load(path)
        open_session(path, threads=1)
    except InputError as error:
        return {"refused": str(error)}
    try:
        results = run_plan(model, Plan.parse(plan), threads=1)
        with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
            after = Path(folder) / path.name
            model.save(after)
            sizes = read_model(path).nbytes, read_model(after).nbytes
            report = equivalence(path, after, Feeds([partial(_feed, path)]), threads=1)
    except Exception as error:
        return {"wrong": [f"{type(error).__name__}: {error}"[:400]]}
    wrong = list(_wrong(report))
    if sizes[1] > sizes[0] + 2048:  # names and bookkeeping
        wrong.append(f"the file grew from {sizes[0]} to {sizes[1]} bytes")
    return {"fired": {result.name: result.fired for result in results}, "nodes": report.nodes, "executed": report.executed,
            "operators": report.operators, "difference": report.differences,
            "bytes": sizes, "wrong": wrong}


def _wrong(report: Equivalence) -> list[str]:
    found = []
    if report.executed["after"] > report.executed["before"]:
        more = {op: counts for op, counts in report.operators.items() if counts["after"] > counts["before"]}
        found.append(f"executes {report.executed['after']} nodes, {report.executed['before']} before: {more}")
    for kind, difference in report.differences.items():
        if isinstance(difference, str):
            found.append(f"moved on {kind} inputs: {difference}")
        elif difference is not None and difference > TOLERANCE:
            found.append(f"moved on {kind} inputs: by {difference:.1e}")
    return found


def _feed(path: Path) -> dict[str, Any]:
    with np.load(path.with_suffix(".npz")) as held:
        return {name[3:]: held[name] for name in held.files if name.startswith("in:")}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts over all files, and the files."""
    ran = [result for result in results if "executed" in result]
    exact = [result for result in ran if not result["lossy"]]
    wrong = {result["file"]: reasons for result in results
             if (reasons := [why for why in result.get("wrong", []) if not (result["lossy"] and why.startswith("moved"))])}
    fired = Counter(name for result in ran for name, count in result["fired"].items() if count)
    largest = [value for result in exact for value in result["difference"].values() if isinstance(value, float)]
    return {"tolerance": TOLERANCE, "files_run": len(ran), "not_lossy": len(exact), "changed": sum(
                any(result["fired"].values()) for result in ran),
            "fired_on": fired, "largest_difference": max(largest, default=0.0),
            "fewer_nodes": sum(result["executed"]["after"] < result["executed"]["before"] for result in ran),
            "more_nodes": sum(result["executed"]["after"] > result["executed"]["before"] for result in ran),
            "smaller": sum(result["bytes"][1] < result["bytes"][0] for result in ran),
            "refused": {result["file"]: result["refused"] for result in results if "refused" in result},
            "wrong": wrong, "files": results}


if __name__ == "__main__":
    sys.exit(main())
