"""``ffnfold optimize``: rewrite a model by a plan, and prove what it cost."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..graph.errors import InputError
from ..graph.places import check_file
from ..passes.optimize import Job, optimize_file
from ..passes.plan import Plan, default_plan
from ..runtime import parse_limit
from . import options
from .output import emit, progress
from .report import print_report, write_report
from .report_folder import check_report
from .short_search import short_search


@click.command("optimize")
@click.argument("model", type=options.PATH)
@click.option("-o", "--output", required=True, type=options.FILE, metavar="OUT", help="The .onnx file to write.")
@click.option("-p", "--pass", "passes", multiple=True, metavar="NAME[:KEY=VALUE,...]",
              help="A pass to run; repeated, in this order. See 'ffnfold passes'.")
@click.option("--plan", "plan_file", type=options.PATH, metavar="FILE.yaml", help="A plan file instead of -p.")
@options.data("Real inputs, to fit, choose and report on; a folder may hold fit/, choose/ and report/.")
@options.synthetic()
@click.option("--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="What the default plan is for.")
@options.provider()
@options.tf32()
@options.allow_cpu()
@options.threads()
@options.logits()
@options.max_drift()
@click.option("--strict", is_flag=True, help="Write nothing when a limit is missed.")
@click.option("--no-verify", is_flag=True, help="Do not measure drift and speed.")
@click.option("--report", "report_folder", type=options.PATH, metavar="DIR",
              help="Write report.html, report.json, report.md and plan.yaml.")
@click.option("--cache", type=options.PATH, metavar="DIR",
              help="Keep moments and moved neurons there: the same command, killed and started again, goes on from them.")
@options.as_json()
def command(model: Path, output: Path, passes: tuple[str, ...], plan_file: Path | None, data: Path | None, synthetic: bool,
            target: str, provider: str, use_tf32: bool, allow_cpu: bool, threads: int | None, logits: tuple[str, ...],
            max_drift: tuple[str, ...], strict: bool, no_verify: bool, report_folder: Path | None, cache: Path | None,
            as_json: bool) -> None:
    """Rewrite MODEL by a plan and write the result to OUT.

    Without -p and --plan the default plan of the target runs, which needs no inputs; with --max-drift and --data, a search of
    two minutes for the fastest plan within the limit. With --data (or --synthetic) the drift against MODEL and the speed are
    measured, and passes that fit have what they fit to. Exit code 1 when a limit was missed, 2 on bad input.
    """
    if passes and plan_file is not None:
        raise InputError("give the plan with -p or with --plan, not both")
    if no_verify and max_drift:
        raise InputError("--max-drift cannot be checked with --no-verify: leave one of them out")
    options.one_kind_of_feeds(data, synthetic)
    plan = Plan.load(plan_file) if plan_file else Plan.parse(passes) if passes else default_plan(target)
    job = Job(model, output, plan, data=data, synthetic=synthetic, provider=provider, threads=threads,
              use_tf32=use_tf32, allow_cpu=allow_cpu,
              logits=logits, limits=[parse_limit(text) for text in max_drift], strict=strict, verify=not no_verify,
              detailed=report_folder is not None, by_pass=report_folder is not None, cache=cache)
    check_file(output, "the model", [plan_file])
    if report_folder is not None:
        check_report(report_folder, [model, plan_file, data])
    searched = bool(max_drift) and not passes and plan_file is None and data is not None and target == provider
    with progress(as_json) as tell:
        if searched:
            report, plan = short_search(job, target, tell)
        else:
            report = optimize_file(job, tell)
    if report_folder is not None:
        write_report(report, plan, report_folder)
    if as_json:
        emit(report)
    else:
        print_report(report)
    if not report["ok"]:
        sys.exit(1)
