"""Every pass alone and all together on a model: how often each fires, what it refuses, and how far the outputs move.

    python benchmarks/passes_on_models.py MODEL FEEDS [--fit N] [--report N] [--only PASS] [--json FILE]

FEEDS holds fit/ and report/ (``ffnfold models get minilm -o DIR`` makes such a folder). Each result is written to a file, which
ONNX Runtime then loads and runs. Exit code 1 if one does not, if an exact pass moves an output by more than 1e-5 of its size,
or if a pass over blocks leaves one alone without a reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ffnfold
from ffnfold.passes.base import BlockPass
from ffnfold.passes.plan import EXACT_PLAN, Plan
from ffnfold.passes.registry import PASSES
from ffnfold.passes.runner import run_plan
from ffnfold.passes.share_ffn import ShareFFN
from ffnfold.runtime import Feeds, compare, load_feeds, open_session
from ffnfold.runtime.specs import input_specs

EXACT = 1e-5
OPTIONS = {"merge-linears": [":force=true"], "linearize-ffn": ["", ":fit=neuron"], "remove-ffn": [":keep=nothing", ""],
           "prune-skip": ["", ":fit=slim"], "quantize-ffn": ["", ":form=weight-only"]}
TOGETHER = (*EXACT_PLAN, "remove-ffn:blocks=0", "linearize-ffn:blocks=1", "linearize-ffn:fit=neuron,blocks=2", "fuse-matmul",
            "quantize-ffn")


def main() -> int:
    """Run every plan and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("feeds", type=Path)
    parser.add_argument("--fit", type=int, default=12, help="use this many fitting feeds")
    parser.add_argument("--report", type=int, default=2, help="use this many reporting feeds")
    parser.add_argument("--only", help="this pass alone, or 'together'")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    specs = input_specs(ffnfold.load(arguments.model))
    feeds = [load_feeds(arguments.feeds / part, specs)[:count] for part, count in
             (("fit", arguments.fit), ("report", arguments.report))]
    plans = {f"{name}{options}": (f"{name}{options}",) for name in sorted(PASSES) for options in OPTIONS.get(name, [""])}
    plans["together"] = TOGETHER
    plans = {name: plan for name, plan in plans.items() if arguments.only in (None, name.partition(":")[0])}
    results = [judge(name, plan, arguments.model, *feeds) for name, plan in plans.items()]
    wrong = [result for result in results if result["wrong"]]
    print(f"{arguments.model}: {len(results)} plans, {len(wrong)} wrong")
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": arguments.model.parent.name, "results": results}, indent=1) + "\n")
    return 1 if wrong else 0


def judge(name: str, texts: tuple[str, ...], path: Path, fit: Feeds, report: Feeds) -> dict[str, Any]:
    """Run one plan on the model at ``path``, and its result in ONNX Runtime."""
    plan, model, started = Plan.parse(texts), ffnfold.load(path), time.time()
    blocks = len(ffnfold.find_ffn_blocks(model))
    results = run_plan(model, plan, fit=fit)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "model.onnx"
        model.save(written)
        open_session(written).run(report[0])
        outputs = compare(path, written, report).outputs
    moved = {output: metrics["rel_l2"] for output, metrics in outputs.items()}
    wrong = []
    if all(each.exact for each in plan) and not max(moved.values()) <= EXACT:  # type: ignore[type-var]
        wrong.append("an exact plan moved an output")
    for each, result in zip(plan, results, strict=True):
        asked = [index for index in range(blocks) if index in each.blocks] if isinstance(each, BlockPass) else []
        said = {refused.block for refused in result.refused}
        kept = round(each.groups * blocks) if isinstance(each, ShareFFN) else 0  # those whose weights the others take
        if len(asked) > result.fired + len(said) + kept and not each.exact:
            wrong.append(f"{each.name} left blocks alone without a reason")
    counts = ", ".join(f"{result.name} {result.fired}" + (f" (refused {len(result.refused)})" if result.refused else "")
                       for result in results)
    shown = ", ".join(f"{output} {value:.3g}" for output, value in moved.items())
    print(f"{name}: {counts}; rel_l2: {shown}; {time.time() - started:.0f} s{''.join(f'; WRONG: {each}' for each in wrong)}",
          flush=True)
    return {"plan": list(texts), "blocks": blocks, "fired": [result.fired for result in results],
            "refused": [sorted({refused.reason for refused in result.refused}) for result in results], "rel_l2": moved,
            "wrong": wrong}


if __name__ == "__main__":
    sys.exit(main())
