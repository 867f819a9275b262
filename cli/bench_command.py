"""``ffnfold bench``: time models against each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from ..graph.errors import InputError
from ..graph.model import Model
from ..graph.places import check_file
from ..runtime import Variant, load_feeds, synthetic_feeds
from ..runtime.baseline import Baseline
from ..runtime.bench import Point, bench, with_ratios
from ..runtime.grid import parse_grid, shape_text
from ..runtime.specs import input_specs
from . import options
from .bench_csv import write_csv
from .output import console, emit, megabytes, placement, progress, say
from .pages import bench_page
from .report_folder import check_report, write_folder


@click.command("bench")
@click.argument("models", nargs=-1, required=True, type=options.PATH, metavar="MODEL [OTHER]...")
@options.data()
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x128",
              help="Make inputs up in this shape; may be repeated, and NAME=1,8x16,128 is a grid.")
@options.provider()
@options.tf32()
@options.allow_cpu()
@click.option("--threads", multiple=True, type=click.IntRange(1, 1024), metavar="N",
              help="Threads inside an operator; repeated, every number is timed.")
@click.option("--seconds", type=options.Amount(0), default=10.0, show_default=True,
              help="How long to time, all models together, at each shape and number of threads; at least 15 rounds.")
@click.option("--cuda-graph", is_flag=True, help="Replay a captured CUDA graph (fixed shapes); also time without one.")
@click.option("--session-config", "config", multiple=True, metavar="KEY=VALUE",
              help="A session configuration entry of ONNX Runtime; may be repeated.")
@click.option("--baseline", type=options.PATH, metavar="RESULT.json", help="An earlier --json result to compare the ratios with.")
@click.option("--max-regression", callback=options.percent, metavar="PERCENT", help="Most that a speed-up may fall behind it.")
@click.option("--roofline", is_flag=True, help="Also what each model computes and moves, against what this machine can do.")
@click.option("--csv", "table", type=options.FILE, metavar="FILE", help="Write a table too.")
@options.report()
@options.as_json()
def command(models: tuple[Path, ...], data: Path | None, shapes: tuple[str, ...], provider: str, use_tf32: bool, allow_cpu: bool,
            threads: tuple[int, ...], seconds: float, cuda_graph: bool, config: tuple[str, ...], baseline: Path | None,
            max_regression: float | None, roofline: bool, table: Path | None, report_folder: Path | None,
            as_json: bool) -> None:
    """Time MODEL and every OTHER in one process, runs interleaved; speed-up = time of MODEL / time of OTHER.

    Exit code 1 when a speed-up fell behind the baseline by more than --max-regression, 2 when CUDA was asked for and nodes
    that compute fell back to the CPU.
    """
    if (baseline is None) != (max_regression is None):
        raise InputError("--baseline and --max-regression go together: give both or none")
    if data is not None and shapes:
        raise InputError("give the inputs with --data or with --shape, not both")
    if table is not None:
        check_file(table, "the table", [*models, baseline, data], in_place=True)
    if report_folder is not None:
        check_report(report_folder, [*models, baseline, data])
    variants = [Variant(path, config=dict(_entry(text) for text in config)) for path in models]
    earlier = Baseline.load(baseline) if baseline is not None else None
    if earlier is not None:
        earlier.check([variant.title for variant in variants])
    points = _points(models[0], data, shapes, threads)
    with progress(as_json) as tell:
        result = bench(variants, points, roofline=roofline, provider=provider, cuda_graph=cuda_graph, use_tf32=use_tf32,
                       allow_cpu=allow_cpu, seconds=seconds, keep_times=report_folder is not None, progress=tell)
    if table is not None:
        write_csv(result, table)
    behind = earlier.behind(result["ratios"], max_regression or 0.0) if earlier is not None else []
    if report_folder is not None:
        page, details = bench_page(result, behind), {"times_ms": [row.pop("times_ms") for row in result["models"]]}
        write_folder(report_folder, result, page, details=details)
    if as_json:
        emit(result)
    else:
        _show(result)
    for text in behind:
        click.echo(f"ffnfold: {text}", err=True)
    if behind:
        sys.exit(1)


def _entry(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--session-config {text}: write it like session.disable_quant_qdq=1")
    return key, value


def _points(model: Path, data: Path | None, shapes: tuple[str, ...], threads: tuple[int, ...]) -> list[Point]:
    """Every shape with every number of threads."""
    first = Model.load(model)
    specs = input_specs(first)
    if data is not None:
        real = load_feeds(data, specs)
        return [Point(real, count) for count in threads or (None,)]
    made = [(shape, synthetic_feeds(specs, shape, model=first)) for shape in parse_grid(shapes)]
    return [Point(feeds, count, shape) for count in threads or (None,) for shape, feeds in made]


def _show(result: dict[str, Any]) -> None:
    both, grid = result["machine"]["cuda_graph"], "shape" in result["models"][0]
    roofline = "roofline" in result["models"][0]
    table = Table(Column("model", overflow="fold"), *(["shape", "threads"] if grid else []), *(["run as"] if both else []), "p50",
                  "p90", "p99", "load", "size", "speed-up (95 % interval)", *(["of the roofline"] if roofline else []), "nodes")
    for each, paired in with_ratios(result):
        for how, times, ratio in _times(each, paired):
            speed = f"{ratio['speedup']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "–"
            place = [shape_text(each["shape"]), str(each["threads"] or "")] if grid else []
            table.add_row(each["model"], *place, *([how] if both else []),
                          *(f"{times[key]:.2f} ms" for key in ("p50_ms", "p90_ms", "p99_ms")), f"{each['load_ms']:.0f} ms",
                          megabytes(each["bytes"]), speed, *([_roofline(each["roofline"])] if roofline else []), placement(each))
    console.print(table)
    if result["provider"] == "cuda":
        machine = result["machine"]
        say(f"{machine['gpu']}, ONNX Runtime {machine['onnxruntime']}, TF32 {'on' if machine['tf32'] else 'off'}")


def _roofline(found: dict[str, Any]) -> str:
    """How near to the bound, and what the bound is made of."""
    return (f"{found['reached']:.0%} ({found['limit']}: {found['operations'] / 1e9:.3g} GOP, "
            f"{(found['weight_bytes'] + found['edge_bytes']) / 1e6:.3g} MB)")


def _times(row: dict[str, Any], ratio: dict[str, Any] | None) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """How a model was run, its times and its ratio: a CUDA graph and without one, where there are both."""
    plain = row.get("without_cuda_graph")
    if plain is None:
        return [("", row, ratio)]
    return [("CUDA graph", row, ratio), ("no graph", plain, ratio and ratio["without_cuda_graph"])]
