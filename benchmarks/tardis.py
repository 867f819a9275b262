"""FFN parameters removed, quality and speed when FFN blocks are folded into one matrix: a table in the shape of TARDIS's.

    python benchmarks/tardis.py MODEL FEEDS --json FILE [--stage quality|speed|both] [--folded PART...] [--fit N]

TARDIS (arXiv 2501.10054) makes the activation of each neuron a line on its frequent range and folds the two matrices; here
without its predictor at run time, so tokens outside the range get the line, too, and nothing of the original block is kept.
Beside it the other ways to one matrix of the same size (``fit=affine``, ``fit=stein``), and Wanda's neurons (arXiv 2306.11695,
summed over the neuron) with as many parameters left. Blocks are folded in the order of their influence, the least first.

FEEDS holds fit/, choose/ and report/. Quality is measured on report/, which nothing was fitted to or chosen on: the increase of
the mean negative log-likelihood of the next token (nats) where an output is called ``logits``, else 1 − the mean cosine of the
last output. Speed is raced against the original, runs interleaved, on the first feeds of report/; the ways to one matrix give the
same graph and are one row there. Every row is written to FILE when it is measured; rows that are there are not measured again, so
the stages may be run at different times (``speed`` on a machine that does nothing else).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import ffnfold
from approximations import ffn_parameters_left, measure, next_token_loss
from ffnfold.passes.base import Context
from ffnfold.passes.fitting.scores import influence
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, Variant, load_feeds, open_session, race
from ffnfold.runtime.specs import input_specs

FOLDS = {"TARDIS, coverage 0.85": "fit=neuron,coverage=0.85,weight=none", "lines, least squares": "fit=neuron",
         "Stein": "fit=stein", "affine": "fit=affine"}
PRUNED = "Wanda"


def plans(blocks: list[Any], order: list[int], part: float) -> dict[str, list[str]]:
    """Method → plan, all leaving about as many parameters: the ``part`` of the blocks of least influence folded."""
    first = blocks[0]
    whole = (3 if first.gated else 2) * first.d_model * first.d_ff
    chosen = sorted(order[:max(1, round(part * len(blocks)))])
    listed = "+".join(map(str, chosen))
    found = {name: [f"linearize-ffn:{options},blocks={listed}", "fuse-matmul"] for name, options in FOLDS.items()
             if not (first.gated and "neuron" in options)}
    left = 1 - len(chosen) / len(blocks) * (1 - first.d_model * first.d_out / whole)
    found[PRUNED] = [f"slim-ffn:keep={left:.4f},multiple=8,select=wanda,refit=none,affine=false,weight=none,target=block"]
    return found


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("feeds", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--stage", choices=["quality", "speed", "both"], default="both")
    parser.add_argument("--folded", type=float, nargs="+", default=[0.33, 0.67, 1.0], help="parts of the blocks")
    parser.add_argument("--fit", type=int, help="feeds to fit on; all if not given")
    arguments = parser.parse_args()
    model = ffnfold.load(arguments.model)
    specs = input_specs(model)
    fit, choose, report = (load_feeds(arguments.feeds / part, specs) for part in ("fit", "choose", "report"))
    fit = fit[:arguments.fit]
    blocks = list(ffnfold.find_ffn_blocks(model))
    result = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
    result.setdefault("model", arguments.model.parent.name)
    if "order" not in result:
        scores = {block.index: influence(model, block, Context(fit, choose)) for block in blocks}
        result["order"] = sorted(scores, key=lambda index: scores[index])
    wanted = {part: plans(blocks, result["order"], part) for part in arguments.folded}
    if arguments.stage != "speed":
        _quality(arguments, result, wanted, fit, choose, report)
    if arguments.stage != "quality":
        _speed(arguments, result, wanted, fit, choose, report)
    show(result)
    return 0


def _quality(arguments: argparse.Namespace, result: dict[str, Any], wanted: dict[float, dict[str, list[str]]], fit: Feeds,
             choose: Feeds, report: Feeds) -> None:
    rows = result.setdefault("quality", [])
    as_text = any(spec.name == "logits" for spec in open_session(arguments.model).outputs)
    if as_text and "base" not in result:
        result["base"] = next_token_loss(arguments.model, report)
    for part, methods in wanted.items():
        for name, plan in methods.items():
            if any((row["folded"], row["method"], row["feeds"]) == (part, name, len(fit)) for row in rows):
                continue
            rows.append({"folded": part, "method": name, "plan": plan, "feeds": len(fit),
                         **measure(arguments.model, plan, fit, choose, report, result.get("base"))})
            _write(arguments.json, result)
            print(f"{part:5.2f}  {name:24s} {rows[-1]['loss']:8.4f}  {rows[-1]['parameters_left']:.3f} left", flush=True)


def _speed(arguments: argparse.Namespace, result: dict[str, Any], wanted: dict[float, dict[str, list[str]]], fit: Feeds,
           choose: Feeds, report: Feeds) -> None:
    """All models in one race; what they are fitted on does not matter here."""
    if "speed" in result:
        return
    variants, rows = [Variant(arguments.model, name="original")], []
    for part, methods in wanted.items():
        for name in ("affine", PRUNED):
            model = ffnfold.load(arguments.model)
            run_plan(model, ffnfold.Plan.parse(methods[name]), fit=fit[:8], choose=choose[:1])
            rows.append({"folded": part, "method": "one matrix" if name == "affine" else name,
                         "parameters_left": ffn_parameters_left(ffnfold.load(arguments.model), model)})
            variants.append(Variant(model, name=f"{name} {part}"))
    timing = race(variants, report, seconds=60)
    result["speed"] = [{**row, **ratio} for row, ratio in zip(rows, timing["ratios"][-len(rows):], strict=True)]
    result["machine"] = timing["machine"]
    result["shapes"] = {name: list(array.shape) for name, array in report[0].items()}
    _write(arguments.json, result)


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def show(result: dict[str, Any]) -> None:
    """The table: one row for each method and number of parameters."""
    speeds = {(row["folded"], row["method"]): f"{row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
              for row in result.get("speed", [])}
    kind = "NLL + nats" if "base" in result else "1 − cosine"
    print(f"| FFN parameters removed | method | {kind} | speed-up |\n| --- | --- | --- | --- |")
    for row in result.get("quality", []):
        speed = speeds.get((row["folded"], PRUNED if row["method"] == PRUNED else "one matrix"), "")
        print(f"| {1 - row['parameters_left']:.1%} | {row['method']} | {row['loss']:.4f} | {speed} |")


if __name__ == "__main__":
    sys.exit(main())
