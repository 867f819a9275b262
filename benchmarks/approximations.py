"""The members of the family of docs/approximations.md, and the baselines that a user would try, at equal FFN parameters.

    python benchmarks/approximations.py MODEL FEEDS --json FILE [--left 0.75 0.5 0.25] [--fit N] [--only NAME...]
    python benchmarks/approximations.py MODEL FEEDS --json FILE --plan PASS...

Of weights with zeros the part ``left`` is not zero, but all stay in the file; a gated block made bilinear keeps all.

FEEDS holds fit/, choose/ and report/ (``ffnfold models get NAME -o DIR`` makes such a folder); what is printed is measured on
report/, which nothing was fitted to or chosen on. The loss is the increase of the mean negative log-likelihood of the next token
(nats) where an output is called ``logits``, else 1 − the mean cosine of the last output. Every row is written to FILE as soon as
it is measured; rows that are there already are not measured again.

Baselines, as published, in the same harness: blocks dropped by cosine (arXiv 2406.15786), neurons dropped by Wanda
(arXiv 2306.11695, summed over the neuron) and by FLAP with its bias (arXiv 2312.11983), all with tokens weighted alike; matrices
factorized by plain SVD and by SVD-LLM (arXiv 2403.07378), the down projection not fitted anew; TARDIS's line for each neuron
(arXiv 2501.10054), of ungated blocks, without its predictor, the blocks chosen by cosine. Beside them: as many attention
sublayers or whole layers as blocks, chosen by cosine too (arXiv 2406.15786), and all biases of FFN blocks (arXiv 2212.14034).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import ffnfold
import numpy as np
from ffnfold.graph.block import FFNBlock
from ffnfold.passes.base import Context
from ffnfold.passes.fitting.scores import influence
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, compare, load_feeds, open_session
from ffnfold.runtime.padding import Padding
from ffnfold.runtime.specs import input_specs

_AS_PUBLISHED = "affine=false,weight=none,target=block"


def plans(blocks: list[FFNBlock], order: list[int], left: float) -> dict[str, tuple[str, list[str]]]:
    """Name → (``ours`` or ``baseline``, plan), each leaving the part ``left`` of the FFN parameters of blocks of one shape."""
    first = blocks[0]
    matrices = 3 if first.gated else 2
    whole = matrices * first.d_model * first.d_ff
    neurons = max(0, round((left * whole - first.d_model ** 2) / (matrices * first.d_model) / 32)) * 32
    gone = round((1 - left) * len(blocks))
    fewest = "+".join(str(index) for index in sorted(order[:gone]))
    affine_gone = min(len(blocks), round((1 - left) * len(blocks) / (1 - first.d_model ** 2 / whole)))
    mapped = "+".join(str(index) for index in sorted(order[:affine_gone]))
    found = {
        "neurons": ("ours", [f"slim-ffn:keep={left},affine=false"]),
        "neurons, not moved": ("beside", [f"slim-ffn:keep={left},affine=false,refine=0"]),
        "neurons, widths spread": ("ours", [f"slim-ffn:keep={left},affine=false,spread=sensitivity"]),
        "affine blocks": ("ours", [f"linearize-ffn:blocks={mapped}"]),
        "blocks dropped": ("baseline", [f"remove-ffn:keep=nothing,blocks={fewest}"]),
        "Wanda": ("baseline", [f"slim-ffn:keep={left},select=wanda,refit=none,{_AS_PUBLISHED}"]),
        "FLAP": ("baseline", [f"slim-ffn:keep={left},select=flap,refit=bias,{_AS_PUBLISHED}"]),
    }
    found |= beside_blocks(gone)
    tied = min(len(blocks) - 1, round((1 - left) * len(blocks) / (1 - 2 * first.d_model ** 2 / whole)))
    if tied:
        found["blocks shared"] = ("ours", [f"share-ffn:groups={len(blocks) - tied}"])
        found["blocks shared, no fix"] = ("beside", [f"share-ffn:groups={len(blocks) - tied},fix=none"])
    if neurons:
        found["partial linear"] = ("ours", [f"slim-ffn:keep={neurons}"])
        found["partial linear, not moved"] = ("beside", [f"slim-ffn:keep={neurons},refine=0"])
        found["partial linear, no skip"] = ("ours", [f"prune-skip:fit=slim,keep={neurons / first.d_ff}"])
        found["partial linear, widths spread"] = ("ours", [f"slim-ffn:keep={neurons},spread=sensitivity"])
    found["thin matrices"] = ("ours", [f"factorize-ffn:ratio={left}"])
    found["thin matrices, shrunk"] = ("ours", [f"factorize-ffn:ratio={left},shrink=true"])
    found["thin matrices, ranks spread"] = ("ours", [f"factorize-ffn:ratio={left},spread=sensitivity"])
    found["SVD-LLM"] = ("baseline", [f"factorize-ffn:ratio={left},target=own,weight=none"])
    found["zeros"] = ("ours", [f"sparsify-ffn:ratio={1 - left}"])
    found["zeros by SparseGPT"] = ("baseline", [f"sparsify-ffn:ratio={1 - left},target=own,weight=none"])
    found["zeros by Wanda"] = ("baseline", [f"sparsify-ffn:ratio={1 - left},method=wanda,target=own,weight=none"])
    if left > 0.25:
        found["loud neurons, the rest thin"] = ("ours", [f"split-ffn:keep=0.25,ratio={(left - 0.25) / 0.75:.4f}"])
    found["bilinear"] = ("ours", ["bilinear-ffn"] if first.gated else [f"bilinear-ffn:blocks={mapped}", "fuse-matmul"])
    found["plain SVD"] = ("baseline", [f"factorize-ffn:ratio={left},whiten=false"])
    if not first.gated:
        found["TARDIS lines"] = ("baseline", [f"linearize-ffn:fit=neuron,weight=none,blocks={mapped}", "fuse-matmul"])
    return found


def beside_blocks(gone: int) -> dict[str, tuple[str, list[str]]]:
    """As many attention sublayers, or layers, as blocks are dropped, and the biases: what goes are no matrices of FFNs."""
    return {
        "attention dropped": ("beside", [f"remove-attention:keep=nothing,count={gone}"]),
        "attention dropped, its mean kept": ("beside", [f"remove-attention:count={gone}"]),
        "layers dropped": ("beside", [f"remove-layer:count={gone}"]),
        "biases dropped, their mean folded": ("beside", ["prune-bias:below=none"]),
        "biases dropped": ("beside", ["prune-bias:below=none,fold=false"]),
    }


def next_token_loss(model: Any, feeds: Feeds, provider: str) -> float:
    """Mean negative log-likelihood of the next token, in nats, over what is no padding."""
    session = open_session(model, provider=provider)
    total, count = 0.0, 0
    for feed in feeds:
        logits = session.run(feed, ["logits"])["logits"].astype(np.float64)
        highest = logits.max(axis=-1, keepdims=True)
        size = np.log(np.exp(logits - highest).sum(axis=-1)) + highest[..., 0]
        ids = feed["input_ids"]
        lost = (size[:, :-1] - np.take_along_axis(logits[:, :-1], ids[:, 1:, None], 2)[..., 0]).reshape(-1)
        kept = Padding(feed).kept((*ids.shape, 1))
        real = np.ones(lost.size, bool) if kept is None else kept.reshape(ids.shape)[:, 1:].reshape(-1)
        total += float(lost[real].sum())
        count += int(real.sum())
    return total / count


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("feeds", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--left", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--fit", type=int, help="use this many fitting feeds (default: all)")
    parser.add_argument("--only", nargs="+", help="names of members and baselines")
    parser.add_argument("--plan", nargs="+", metavar="PASS", help="measure this plan alone, beside what is in FILE")
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu", help="what runs the model")
    arguments = parser.parse_args()
    model = ffnfold.load(arguments.model)
    specs = input_specs(model)
    fit, choose, report = (load_feeds(arguments.feeds / part, specs) for part in ("fit", "choose", "report"))
    fit = fit[:arguments.fit]
    blocks = list(ffnfold.find_ffn_blocks(model))
    result: dict[str, Any] = {"model": arguments.model.parent.name, "rows": []}
    if arguments.json.is_file():
        result = json.loads(arguments.json.read_text())
    as_text = any(spec.name == "logits" for spec in open_session(arguments.model).outputs)
    if as_text and "base" not in result:
        result["base"] = next_token_loss(arguments.model, report, arguments.provider)
    if arguments.plan:
        row = measure(arguments.model, arguments.plan, (fit, choose, report), result.get("base"), arguments.provider)
        add(result, {"left": round(row["parameters_left"], 2), "name": " ".join(arguments.plan), "kind": "ours",
                     "plan": arguments.plan, **row}, arguments.json)
        return 0
    if "order" not in result:
        context = Context(fit, choose, arguments.provider)
        scores = {block.index: influence(model, block, context) for block in blocks}
        result["order"] = sorted(scores, key=lambda index: scores[index])
    for left in arguments.left:
        for name, (kind, texts) in plans(blocks, result["order"], left).items():
            known = any(row["left"] == left and row["name"] == name for row in result["rows"])
            if known or (arguments.only and name not in arguments.only):
                continue
            row = measure(arguments.model, texts, (fit, choose, report), result.get("base"), arguments.provider)
            add(result, {"left": left, "name": name, "kind": kind, "plan": texts, **row}, arguments.json)
    show(result)
    return 0


def add(result: dict[str, Any], row: dict[str, Any], path: Path) -> None:
    """Put ``row`` into ``result``, write that and print the row."""
    result["rows"].append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{row['left']:5.2f}  {row['name']:32s} {row['loss']:8.4f}  {row['parameters_left']:.3f} left", flush=True)


def measure(path: Path, texts: list[str], feeds: tuple[Feeds, Feeds, Feeds], base: float | None,
            provider: str) -> dict[str, Any]:
    """One row: the loss, the drift of each output, the part of the FFN parameters that is left, and seconds to rewrite."""
    fit, choose, report = feeds
    model = ffnfold.load(path)
    before = model.copy()
    start = time.perf_counter()
    results = run_plan(model, ffnfold.Plan.parse(texts), fit=fit, choose=choose, provider=provider)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {"fired": [each.fired for each in results], "seconds": round(seconds, 1),
                           "parameters_left": ffn_parameters_left(before, model)}
    if base is not None:
        return {**row, "loss": next_token_loss(model, report, provider) - base}
    outputs = compare(path, model, report, provider=provider).to_json()["outputs"]
    drift = {name: {metric: each[metric] for metric in ("cosine_mean", "rel_l2")} for name, each in outputs.items()}
    return {**row, "loss": 1 - list(drift.values())[-1]["cosine_mean"], "drift": drift}


def ffn_parameters_left(before: ffnfold.Model, after: ffnfold.Model) -> float:
    """Part of the parameters of the FFN blocks of ``before`` that ``after`` still has (everything else is untouched)."""
    whole = sum(block.parameters for block in ffnfold.find_ffn_blocks(before))
    return 1 - (_numbers(before) - _numbers(after)) / whole


def _numbers(model: ffnfold.Model) -> int:
    """Numbers in all initializers of the main graph."""
    proto, _ = model.to_proto()
    read = {name for node in proto.graph.node for name in node.input}
    return sum(int(np.prod(tensor.dims, dtype=np.int64)) for tensor in proto.graph.initializer if tensor.name in read)


def show(result: dict[str, Any]) -> None:
    """The table, and for each point the best member against the best baseline."""
    print("| parameters left | what | loss |\n| --- | --- | --- |")
    for left in sorted({row["left"] for row in result["rows"]}, reverse=True):
        rows = sorted((row for row in result["rows"] if row["left"] == left), key=lambda row: float(row["loss"]))
        for row in rows:
            kind = "" if row["kind"] == "ours" else f" ({row['kind']})"
            print(f"| {left:.2f} ({row['parameters_left']:.3f}) | {row['name']}{kind} | {row['loss']:.4f} |")
        best = {kind: min((row["loss"] for row in rows if row["kind"] == kind), default=None) for kind in ("ours", "baseline")}
        if None not in best.values():
            print(f"| {left:.2f} | best of ours / best baseline | {best['ours'] / best['baseline']:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
