"""remove-ffn and quantize-ffn on a folder of exported graphs: they fire on the blocks, and every result runs.

    python benchmarks/approximate_zoo.py FOLDER [--only TEXT] [--plan PASS]... [--json FILE]

A pass that needs inputs is fitted on the file's own.

FOLDER holds NAME.onnx, NAME.npz (its inputs, as ``in:INPUT``) and truth.json, whose entries say what was made of a graph
(``variant``). On every file, also those that are lossy, each of ``remove-ffn:keep=nothing``, ``quantize-ffn`` and
``quantize-ffn:form=weight-only`` is run on the blocks whose weights are still in float. Printed: the share of these on which
it fired, and for the others the reason, by variant. Checked: the written file runs on the file's inputs, and its outputs have the
types and shapes that those of the original have. Exit code 1 if a result does not, or if under 95 % of the blocks fired.
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
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, open_session

GOAL = 0.95
PLANS = ("remove-ffn:keep=nothing", "quantize-ffn", "quantize-ffn:form=weight-only")


def main() -> int:
    """Run every plan on every file and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--plan", action="append", help="one of the passes alone; may be repeated")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "approximate_zoo.json")
    arguments = parser.parse_args()
    truth = json.loads((arguments.folder / "truth.json").read_text())
    started = time.time()
    reports = {}
    for plan in arguments.plan or PLANS:
        results = []
        for path in sorted(arguments.folder.glob("*.onnx")):
            if arguments.only in path.name and path.name in truth:
                results.append({"file": path.name, "variant": truth[path.name]["variant"], **judge(path, plan)})
                if results[-1]["wrong"]:
                    print(f"WRONG {plan} on {path.name}: {results[-1]['wrong']}", flush=True)
        reports[plan] = summary(results)
        print(plan, json.dumps({key: value for key, value in reports[plan].items() if key != "files"}, indent=1), flush=True)
    print(f"{time.time() - started:.0f} s")
    if not arguments.only and not arguments.plan:
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n")
    return 1 if any(report["wrong"] or report["share"] < GOAL for report in reports.values()) else 0


def judge(path: Path, plan: str) -> dict[str, Any]:
    """How many blocks in float the plan fired on in one file, and what is wrong with the result."""
    try:
        return _judge(path, plan)
    except Exception as error:
        return {"blocks": 0, "fired": 0, "refused": [], "wrong": f"{type(error).__name__}: {error}"[:400]}


def _judge(path: Path, plan: str) -> dict[str, Any]:
    model = Model.load(path)
    float_blocks = [block.index for block in find_ffn_blocks(model) if not block.quantized]
    if not float_blocks:
        return {"blocks": 0, "fired": 0, "refused": [], "wrong": None}
    blocks = f"blocks={'+'.join(map(str, float_blocks))}"
    parsed = Plan.parse([f"{plan}{',' if ':' in plan else ':'}{blocks}"])
    fit = Feeds.of([_feed(path)]) if parsed.needs_feeds else None
    [result] = run_plan(model, parsed, fit=fit, threads=1)
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        after = Path(folder) / path.name
        model.save(after)
        feed = _feed(path)
        kinds = [_kinds(open_session(each, threads=1).run(feed)) for each in (path, after)]
    wrong = None if kinds[0] == kinds[1] else f"outputs {kinds[0]} became {kinds[1]}"
    return {"blocks": len(float_blocks), "fired": result.fired, "refused": [refused.reason for refused in result.refused],
            "wrong": wrong}


def _feed(path: Path) -> dict[str, Any]:
    with np.load(path.with_suffix(".npz")) as held:
        return {name[3:]: held[name] for name in held.files if name.startswith("in:")}


def _kinds(outputs: dict[str, Any]) -> dict[str, str]:
    return {name: f"{np.asarray(value).dtype}{list(np.asarray(value).shape)}" for name, value in outputs.items()}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts over all files, and the files."""
    blocks, fired = (sum(result[key] for result in results) for key in ("blocks", "fired"))
    refused = Counter(f"{result['variant']}: {reason}" for result in results for reason in result["refused"])
    return {"files": results, "files_with_blocks_in_float": sum(result["blocks"] > 0 for result in results),
            "blocks_in_float": blocks, "fired": fired, "share": fired / max(blocks, 1), "refused": refused,
            "wrong": {result["file"]: result["wrong"] for result in results if result["wrong"]}}


if __name__ == "__main__":
    sys.exit(main())
