"""What it costs to replace one FFN block at a time: removed, its mean kept, made affine; measured at the model's output.

    python benchmarks/single_blocks.py MODEL FEEDS [--blocks 0+5] [--json FILE]

FEEDS holds fit/ and report/ (``ffnfold models get minilm -o DIR`` makes such a folder). Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ffnfold
from ffnfold.passes.blocks import Blocks
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import compare, load_feeds, open_session
from ffnfold.runtime.specs import input_specs

PLANS = {"nothing": "remove-ffn:keep=nothing", "mean": "remove-ffn:keep=mean", "affine": "linearize-ffn",
         "neuron": "linearize-ffn:fit=neuron"}


def main() -> int:
    """Measure and print; exit code 1 if an affine block is worse than its mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("feeds", type=Path)
    parser.add_argument("--blocks", default="all")
    parser.add_argument("--fit", type=int, help="use this many fitting feeds (default all)")
    parser.add_argument("--report", type=int, help="use this many reporting feeds (default all)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = ffnfold.load(arguments.model)
    specs = input_specs(model)
    fit, report = load_feeds(arguments.feeds / "fit", specs), load_feeds(arguments.feeds / "report", specs)
    fit, report = fit[:arguments.fit], report[:arguments.report]
    chosen = [block.index for block in ffnfold.find_ffn_blocks(model) if block.index in Blocks.parse(arguments.blocks)]
    gated = {block.index for block in ffnfold.find_ffn_blocks(model) if block.gated}
    reference = open_session(arguments.model)
    results: list[dict[str, Any]] = []
    for index in chosen:
        for how, text in PLANS.items():
            if how == "neuron" and index in gated:
                continue
            trial = ffnfold.load(arguments.model)
            plan = ffnfold.Plan.parse([text + ("," if ":" in text else ":") + f"blocks={index}"])
            run_plan(trial, plan, fit=fit)
            outputs = compare(reference, trial, report).to_json()["outputs"]
            results.append({"block": index, "how": how, "outputs": outputs})
            shown = "  ".join(f"{name}: cosine {each['cosine_mean']:.5f} rel_l2 {each['rel_l2']:.4f}"
                              + (f" kl {each['kl_mean']:.4f}" if each["kl_mean"] is not None else "")
                              for name, each in outputs.items())
            print(f"block {index:2d}  {how:8s} {shown}", flush=True)
    worse = [index for index in chosen if not _beats(results, index)]
    print(f"affine beats mean on {len(chosen) - len(worse)} of {len(chosen)} blocks" + (f", not on {worse}" if worse else ""))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"model": arguments.model.name, "results": results}, indent=1) + "\n")
    return 1 if worse else 0


def _beats(results: list[dict[str, Any]], index: int) -> bool:
    """Whether the affine block has the smaller relative error, and KL divergence where there is one, on every output."""
    found = {each["how"]: each["outputs"] for each in results if each["block"] == index}
    return all(found["affine"][name][metric] < found["mean"][name][metric]
               for name in found["mean"] for metric in ("rel_l2", "kl_mean") if found["mean"][name][metric] is not None)


if __name__ == "__main__":
    sys.exit(main())
