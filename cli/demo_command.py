"""``ffnfold demo``: the whole job on a real model."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .. import models
from ..graph.report import describe
from ..passes.optimize import Job, optimize_file
from ..passes.plan import default_plan
from .options import PATH
from .output import emit, progress, say
from .page import missing_library
from .report import print_report, write_report
from .report_folder import check_report


@click.command("demo")
@click.option("-o", "--output", type=PATH, default=Path("out/vit-s"), show_default=True, metavar="DIR",
              help="Where model, report and plan go.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def command(output: Path, as_json: bool) -> None:
    """Fetch ViT-S, find its FFN blocks, rewrite it by the default CPU plan, verify and time it on real images."""
    check_report(output)
    plan = default_plan("cpu")
    with progress(as_json) as tell:
        tell("fetching ViT-S")
        model = models.get("vit-s", output / "original", tell)
        blocks = describe(model)["ffn_blocks"]
        job = Job(model, output / "optimized.onnx", plan, data=output / "original" / "feeds", detailed=missing_library() is None)
        report = optimize_file(job, tell)
    report = {"blocks": len(blocks), **report}  # type: ignore[arg-type]
    write_report(report, plan, output)
    if as_json:
        emit(report)
    else:
        print_report(report)
        page = "report.html, " if (output / "report.html").exists() else ""
        say(f"written: {output}/optimized.onnx, plan.yaml, {page}report.json, report.md")
    if not report["ok"]:
        sys.exit(1)
