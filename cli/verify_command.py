"""``ffnfold verify``: how far a model moved from its reference."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from ..graph.errors import InputError
from ..graph.model import Model
from ..passes.proof.verification import Check, verify_files
from ..runtime import load_feeds, parse_limit, synthetic_feeds
from ..runtime.specs import input_specs
from . import options
from .output import console, emit, placement, progress, say
from .page.section import worst
from .pages import verify_page
from .report_folder import check_report, write_folder

_METRICS = ("cosine_mean", "cosine_min", "rel_l2", "max_abs", "sqnr_db", "kl_mean", "top1")


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
@click.option("--per-block", is_flag=True, help="Also the drift that each FFN block causes alone, and what it adds in the chain.")
@options.report()
@options.as_json()
def command(reference: Path, candidate: Path, data: Path | None, synthetic: bool, provider: str, use_tf32: bool,
            allow_cpu: bool, threads: int | None, logits: tuple[str, ...], max_drift: tuple[str, ...], per_block: bool,
            report_folder: Path | None, as_json: bool) -> None:
    """Run REFERENCE and CANDIDATE on the same inputs and measure how far each output moved.

    Vectors are rows of the last axis; rows that are padding (attention_mask 0) do not count. Exit code 1 when a limit was
    missed, 2 when CUDA was asked for and nodes that compute fell back to the CPU.
    """
    options.one_kind_of_feeds(data, synthetic)
    limits = [parse_limit(text) for text in max_drift]
    model = Model.load(reference)
    Model.load(candidate)
    specs = input_specs(model)
    if data is None and not synthetic:
        raise InputError("there is nothing to compare on: give real inputs with --data FEEDS, or --synthetic")
    feeds = load_feeds(data, specs) if data is not None else synthetic_feeds(
        specs, model=model, count=4, provider=provider)
    if report_folder is not None:
        check_report(report_folder, [reference, candidate, data])
    check = Check(reference, candidate, feeds, per_block=per_block, provider=provider, threads=threads, use_tf32=use_tf32,
                  allow_cpu=allow_cpu, logits=logits, limits=limits)
    with progress(as_json) as tell:
        found = verify_files(check, tell)
    drift, result = found.drift, found.to_json()
    if report_folder is not None:
        page = verify_page(reference, candidate, result, drift.missed, str(found.overflow) if found.overflow else None)
        write_folder(report_folder, result, page)
    if as_json:
        emit(result)
    else:
        _show(result, reference, candidate)
    if found.overflow is not None:
        click.echo(f"ffnfold: {found.overflow}", err=True)
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
        table.add_row(name, *_numbers(metrics, *_METRICS))
    console.print(table)
    if "blocks" in result:
        _show_blocks(result)


def _show_blocks(result: dict[str, Any]) -> None:
    """The blocks, the one that does most damage alone first."""
    say(f"per block, on {result['block_samples']} of the feeds; each output's relative error, worst output, most damage first")
    table = Table("rank", "block", Column("name", overflow="fold"), "alone", "cosine", "KL", "chain", "adds", "at the block")
    compared = [each for each in result["blocks"] if each["rank"] is not None]
    for each in sorted(compared, key=lambda entry: entry["rank"]):
        alone = _numbers(worst(each["alone"]), "rel_l2", "cosine_mean", "kl_mean")
        added = max((size for size in each["added"].values() if size is not None), default=None)
        chain = _numbers(worst(each["chain"]), "rel_l2")
        table.add_row(str(each["rank"]), f"block {each['block']}", each["name"], *alone, *chain,
                      "–" if added is None else f"{added:+.4g}", *_numbers(each, "rel_l2"))
    console.print(table)
    for each in result["blocks"]:
        if each["rank"] is None:
            say(f"  block {each['block']} was left out: {each['reason']}")


def _numbers(metrics: Mapping[str, Any], *keys: str) -> list[str]:
    return ["–" if metrics.get(key) is None else f"{metrics[key]:.6g}" for key in keys]
