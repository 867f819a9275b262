"""``ffnfold bench``: time models against each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Column, Table

from ..graph.errors import InputError
from ..graph.model import Model
from ..runtime import Variant, load_feeds, parse_shape, race, synthetic_feeds
from ..runtime.specs import input_specs
from . import options
from .output import console, emit, megabytes, placement, progress, say


@click.command("bench")
@click.argument("models", nargs=-1, required=True, type=options.PATH, metavar="MODEL [OTHER]...")
@options.data()
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x128", help="Make inputs up in this shape; may be repeated.")
@options.provider()
@options.tf32()
@options.allow_cpu()
@options.threads()
@click.option("--cuda-graph", is_flag=True, help="Replay a captured CUDA graph (fixed shapes); also time without one.")
@click.option("--session-config", "config", multiple=True, metavar="KEY=VALUE",
              help="A session configuration entry of ONNX Runtime; may be repeated.")
@click.option("--baseline", type=options.PATH, metavar="RESULT.json", help="An earlier --json result to compare the ratios with.")
@click.option("--max-regression", type=click.FloatRange(0), metavar="PERCENT", help="Most that a speed-up may fall behind it.")
@options.as_json()
def command(models: tuple[Path, ...], data: Path | None, shapes: tuple[str, ...], provider: str, use_tf32: bool, allow_cpu: bool,
            threads: int | None, cuda_graph: bool, config: tuple[str, ...], baseline: Path | None,
            max_regression: float | None, as_json: bool) -> None:
    """Time MODEL and every OTHER in one process, runs interleaved; speed-up = time of MODEL / time of OTHER.

    Exit code 1 when a speed-up fell behind the baseline by more than --max-regression, 2 when CUDA was asked for and nodes
    that compute fell back to the CPU.
    """
    if (baseline is None) != (max_regression is None):
        raise InputError("--baseline and --max-regression go together: give both or none")
    if data is not None and shapes:
        raise InputError("give the inputs with --data or with --shape, not both")
    first = Model.load(models[0])
    specs = input_specs(first)
    given = dict(parse_shape(text) for text in shapes)
    feeds = load_feeds(data, specs) if data is not None else synthetic_feeds(specs, given, model=first)
    entries = dict(_entry(text) for text in config)
    earlier = _ratios(baseline) if baseline is not None else {}
    with progress(as_json) as tell:
        result: dict[str, Any] = race([Variant(path, config=entries) for path in models], feeds, provider=provider,
                                      threads=threads, cuda_graph=cuda_graph, use_tf32=use_tf32, allow_cpu=allow_cpu,
                                      progress=lambda done, total: tell(f"round {done} of {total}"))
    behind = _behind(result["ratios"], earlier, max_regression or 0.0)
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


def _ratios(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(each["model"]): float(each["speedup"]) for each in found["ratios"]}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: give a result that 'ffnfold bench --json' printed") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no result of 'ffnfold bench --json' ({type(error).__name__})") from None


def _behind(ratios: list[dict[str, Any]], earlier: dict[str, float], percent: float) -> list[str]:
    return [f"{each['model']}: speed-up {each['speedup']:.3f}, was {earlier[each['model']]:.3f}: more than {percent:g} % behind"
            for each in ratios
            if each["model"] in earlier and each["speedup"] < earlier[each["model"]] * (1 - percent / 100)]


def _show(result: dict[str, Any]) -> None:
    ratios = {each["model"]: each for each in result["ratios"]}
    both = result["machine"]["cuda_graph"]
    table = Table(Column("model", overflow="fold"), *(["run as"] if both else []), "p50", "p90", "p99", "load", "size",
                  "speed-up (95 % interval)", "nodes")
    for each in result["models"]:
        for how, times, ratio in _times(each, ratios.get(each["model"])):
            speed = f"{ratio['speedup']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})" if ratio else "–"
            table.add_row(each["model"], *([how] if both else []),
                          *(f"{times[key]:.2f} ms" for key in ("p50_ms", "p90_ms", "p99_ms")), f"{each['load_ms']:.0f} ms",
                          megabytes(each["bytes"]), speed, placement(each))
    console.print(table)
    if result["provider"] == "cuda":
        machine = result["machine"]
        say(f"{machine['gpu']}, ONNX Runtime {machine['onnxruntime']}, TF32 {'on' if machine['tf32'] else 'off'}")


def _times(row: dict[str, Any], ratio: dict[str, Any] | None) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """How a model was run, its times and its ratio: a CUDA graph and without one, where there are both."""
    plain = row.get("without_cuda_graph")
    if plain is None:
        return [("", row, ratio)]
    return [("CUDA graph", row, ratio), ("no graph", plain, ratio and ratio["without_cuda_graph"])]
