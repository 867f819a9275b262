"""``ffnfold verify``: how far a model moved from its reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from ..graph.errors import InputError
from ..graph.model import Model
from ..passes.per_block import shared_block_outputs
from ..runtime import compare, load_feeds, parse_limit, synthetic_feeds
from ..runtime.specs import input_specs
from . import options
from .output import console, emit, placement, progress, say


@click.command("verify")
@click.argument("reference", type=options.PATH)
@click.argument("candidate", type=options.PATH)
@options.data()
@options.synthetic()
@options.provider()
@options.tf32()
@options.allow_cpu()
@options.threads()
@options.logits()
@options.max_drift()
@click.option("--per-block", is_flag=True, help="Also the output of each FFN block that both models have.")
@options.as_json()
def command(reference: Path, candidate: Path, data: Path | None, synthetic: bool, provider: str, use_tf32: bool,
            allow_cpu: bool, threads: int | None, logits: tuple[str, ...], max_drift: tuple[str, ...], per_block: bool,
            as_json: bool) -> None:
    """Run REFERENCE and CANDIDATE on the same inputs and measure how far each output moved.

    Vectors are rows of the last axis; rows that are padding (attention_mask 0) do not count. Exit code 1 when a limit was
    missed, 2 when CUDA was asked for and nodes that compute fell back to the CPU.
    """
    limits = [parse_limit(text) for text in max_drift]
    model, other = Model.load(reference), Model.load(candidate)
    specs = input_specs(model)
    if data is None and not synthetic:
        raise InputError("there is nothing to compare on: give real inputs with --data FEEDS, or --synthetic")
    feeds = load_feeds(data, specs) if data is not None else synthetic_feeds(specs, model=model, count=4)
    blocks = shared_block_outputs(model, other) if per_block else {}
    with progress(as_json) as tell:
        drift = compare(reference, candidate, feeds, provider=provider, threads=threads, logits=logits, limits=limits,
                        use_tf32=use_tf32, allow_cpu=allow_cpu,
                        progress=lambda done, total: tell(f"feed {done} of {total}"))
        inner = None
        if blocks:
            tell("comparing block by block")
            inner = compare(reference, candidate, feeds, provider=provider, threads=threads, outputs=list(blocks.values()),
                            use_tf32=use_tf32, allow_cpu=allow_cpu)
    result: dict[str, Any] = drift.to_json()
    if per_block:
        outputs = inner.to_json()["outputs"] if inner is not None else {}
        result["blocks"] = [{"block": index, "value": name, **outputs[name]} for index, name in blocks.items()]
    if as_json:
        emit(result)
    else:
        _show(result, reference, candidate)
    for sentence in drift.missed:
        click.echo(f"ffnfold: {sentence}", err=True)
    if not drift:
        sys.exit(1)


def _show(result: dict[str, Any], reference: Path, candidate: Path) -> None:
    say(f"{candidate} against {reference}, {result['samples']} {result['feeds']} feeds, {result['provider']}")
    if "cuda" in result:
        say(f"TF32 {'on' if result['cuda']['tf32'] else 'off'}")
        for which in ("reference", "candidate"):
            say(f"{which}: {placement(result['cuda'][which])}")
    table = Table(Column("value", overflow="fold"), "cosine mean", "min", "rel. error", "max. error", "SQNR", "KL", "top-1")
    for name, metrics in result["outputs"].items():
        table.add_row(name, *_cells(metrics))
    for block in result.get("blocks", []):
        table.add_row(f"block {block['block']}", *_cells(block))
    console.print(table)


def _cells(metrics: dict[str, Any]) -> list[str]:
    keys = ("cosine_mean", "cosine_min", "rel_l2", "max_abs", "sqnr_db", "kl_mean", "top1")
    return ["–" if metrics.get(key) is None else f"{metrics[key]:.6g}" for key in keys]
