"""The approximate passes on a folder of exported graphs: they fire on the blocks, and every result runs.

    python benchmarks/approximate_zoo.py FOLDER [--only TEXT] [--plan PASS]... [--json FILE]

FOLDER holds NAME.onnx, NAME.npz (its inputs, as ``in:INPUT``) and truth.json, whose entries say what was made of a graph
(``variant``). On every file, also those that are lossy, each of the plans below is run on the blocks whose weights are still in
float; what needs feeds is fitted to the file's own inputs. Printed: the share of these blocks on which it fired, and for the
others the reason, by variant. Checked: the written file runs on the file's inputs, and its outputs have the types and shapes
that those of the original have. Exit code 1 if a result does not, or if under 95 % of the blocks fired that the plan applies to
(90 % where something is measured: a token must reach the block). A plan does not apply to a block that has not what it takes out
(a bias, attention in front), whose sum is not its own, or whose experts lie packed in one weight; and of blocks that are tied,
the one that keeps its weights counts as fired. Where --plan names some of the plans, the others keep the results they have
in the file.
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

GOALS = {"remove-ffn:keep=nothing": 0.95, "quantize-ffn": 0.95, "quantize-ffn:form=weight-only": 0.95, "factorize-ffn": 0.9,
         "sparsify-ffn": 0.9, "split-ffn": 0.9, "bilinear-ffn": 0.9}
NOT_FOR = ("it has no bias that could be taken out", "there is no attention in front of it",
           "its experts are packed in one weight",
           "its branch into the residual Add carries something else too, or is read elsewhere")


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
    for plan in arguments.plan or GOALS:
        results = []
        for path in sorted(arguments.folder.glob("*.onnx")):
            if arguments.only in path.name and path.name in truth:
                results.append({"file": path.name, "variant": truth[path.name]["variant"], **judge(path, plan)})
                if results[-1]["wrong"]:
                    print(f"WRONG {plan} on {path.name}: {results[-1]['wrong']}", flush=True)
        reports[plan] = summary(results)
        print(plan, json.dumps({key: value for key, value in reports[plan].items() if key != "files"}, indent=1), flush=True)
    print(f"{time.time() - started:.0f} s")
    if not arguments.only:
        known = json.loads(arguments.json.read_text()) if arguments.plan and arguments.json.is_file() else {}
        arguments.json.write_text(json.dumps({**known, **reports}, indent=1) + "\n")
    return 1 if any(report["wrong"] or report["share"] < GOALS.get(plan, 0.9) for plan, report in reports.items()) else 0


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
    feed = _feed(path)
    fit = Feeds.of([feed]) if parsed.needs_feeds else None
    [result] = run_plan(model, parsed, fit=fit, threads=1)
    kept = len(float_blocks) - result.fired - len(result.refused) if result.fired and plan.startswith("share-ffn") else 0
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        after = Path(folder) / path.name
        model.save(after)
        kinds = [_kinds(open_session(each, threads=1).run(feed)) for each in (path, after)]
    wrong = None if kinds[0] == kinds[1] else f"outputs {kinds[0]} became {kinds[1]}"
    return {"blocks": len(float_blocks), "fired": result.fired + kept, "refused": [refused.reason for refused in result.refused],
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
    applied = blocks - sum(reason.startswith(NOT_FOR) for result in results for reason in result["refused"])
    return {"files": results, "files_with_blocks_in_float": sum(result["blocks"] > 0 for result in results),
            "blocks_in_float": blocks, "applies_to": applied, "fired": fired, "share": fired / max(applied, 1),
            "refused": refused, "wrong": {result["file"]: result["wrong"] for result in results if result["wrong"]}}


if __name__ == "__main__":
    sys.exit(main())
