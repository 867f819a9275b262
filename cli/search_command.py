"""``ffnfold search``: say what drift is bearable, get the fastest model there is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from ..graph.errors import InputError
from ..passes.plan import Plan
from ..search import SearchJob, search_file
from ..search.goal import parse_goal
from . import options
from .output import console, emit, megabytes, progress, say
from .report import print_report, write_report
from .report_folder import check_report


@click.command("search")
@click.argument("model", type=options.PATH)
@click.option("-o", "--output", required=True, type=options.FILE, metavar="OUT",
              help="The .onnx file to write; plan.yaml and front.json go beside it.")
@click.option("--data", required=True, type=options.PATH, metavar="FEEDS",
              help="Real inputs; a folder may hold fit/, choose/ and report/.")
@options.max_drift()
@click.option("--min-speedup", type=options.Amount(0, min_open=True), metavar="X", help="How much faster it must be.")
@click.option("--max-bytes", type=click.IntRange(1), metavar="N", help="How large it may be.")
@click.option("--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where it is to be fast.")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=8x128[*WEIGHT]",
              help="A shape that matters, and how often it comes; may be repeated. Else as the feeds are.")
@options.threads()
@click.option("--budget", type=options.Amount(0, min_open=True), default=30.0, show_default=True, metavar="MINUTES",
              help="When to stop measuring.")
@click.option("--perplexity", metavar="OUTPUT", help="Also perplexity, from the logits in OUTPUT: a metric of --max-drift.")
@click.option("--score", metavar="MODULE:FUNCTION", help="Also your own metric, 'score' in --max-drift: 0 is no difference.")
@click.option("--scheduler", metavar="ADDRESS", help="A Dask scheduler, to measure drift on its workers.")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, metavar="N",
              help="Processes on this machine that measure drift.")
@click.option("--cache", type=options.PATH, metavar="DIR", help="Where measurements are kept.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Another seed measures anew.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured and how long that takes.")
@click.option("--front", type=options.PATH, metavar="DIR", help="Also write the model of each plan on the front there.")
@click.option("--report", "report_folder", type=options.PATH, metavar="DIR",
              help="Write report.html, report.json, report.md and plan.yaml, with the front.")
@options.as_json()
def command(model: Path, output: Path, data: Path, max_drift: tuple[str, ...], min_speedup: float | None, max_bytes: int | None,
            target: str, shapes: tuple[str, ...], threads: int | None, budget: float, perplexity: str | None, score: str | None,
            scheduler: str | None, workers: int, cache: Path | None, seed: int, dry_run: bool,
            front: Path | None, report_folder: Path | None, as_json: bool) -> None:
    """Find the fastest plan for MODEL within limits, and write the model it makes to OUT.

    Exit code 1 when a limit is missed on the feeds that report, 2 on bad input.
    """
    if scheduler is not None and workers > 1:
        raise InputError("--scheduler and --workers both say where drift is measured: give one of them")
    job = SearchJob(model, output, data, limits=[parse_goal(text) for text in max_drift], min_speedup=min_speedup,
                    max_bytes=max_bytes, target=target, threads=threads, shapes=shapes, minutes=budget, perplexity=perplexity,
                    score=score, scheduler=scheduler, workers=workers, cache=cache, seed=seed,
                    detailed=report_folder is not None, front=front)
    if report_folder is not None:
        check_report(report_folder, [model, data])
    with progress(as_json) as tell:
        report = search_file(job, tell, dry_run=dry_run)
    if report_folder is not None and not dry_run:
        write_report(report, Plan.from_entries(report["plan"]), report_folder)
    if as_json:
        emit(report)
    elif dry_run:
        _show_plan(report)
    else:
        show_front(report)
        print_report(report)
    if not report.get("ok", True):
        sys.exit(1)


def show_front(report: dict[str, Any]) -> None:
    """The points that no other beats, the slowest first."""
    names = list(report["front"][0]["damage"])
    table = Table("", *names, "speed-up", "size", Column("what each block becomes", overflow="fold"))
    for point in report["front"]:
        metrics = [_number(point["drift"].get(name.partition("@")[2], {}).get(name.partition("@")[0])) for name in names]
        changed = ", ".join(f"{'attention' if unit == '-1' else unit} {what}" for unit, what in point["choice"].items()
                            if what != "keep")
        table.add_row("→" if point["chosen"] else "", *metrics, f"{point['speedup']:.2f}", megabytes(point["bytes"]),
                      changed or "–")
    console.print(table)
    say(f"{report['measured']} measurements made, {report['reused']} were there, {report['seconds']:.0f} s")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _show_plan(report: dict[str, Any]) -> None:
    table = Table("unit", Column("candidates", overflow="fold"))
    for unit, several in report["candidates"].items():
        table.add_row(unit, ", ".join(several))
    console.print(table)
    counts, minutes = report["measurements"], report["minutes"]
    say(f"{counts['drift']} candidates to measure the drift of, {counts['latency']} to time "
        f"({report['block_shapes']} shapes of blocks)")
    say(f"about {minutes['alone']:.1f} minutes, then {minutes['each_plan']:.1f} for each plan that is built; "
        f"the budget is {minutes['budget']:g}")
