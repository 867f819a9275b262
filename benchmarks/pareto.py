"""Drift against latency: what a search finds as a line, models of others as points, all raced in one run.

    python benchmarks/int8_peers.py --prepare DIR --models minilm=FOLDER vit-s=FOLDER gemma3-270m=FOLDER
    python benchmarks/pareto.py DIR --models minilm [--budget 30] [--limits 0.99 0.95] [--threads N] [--json FILE] [--svg FOLDER]
    python benchmarks/pareto.py DIR --models minilm --simulate

The first command makes the peers' models (``int8_peers.py``), which are points here. The second searches each model with each
limit on the cosine of its main output (one cache, so that later limits use what was measured for earlier ones), and then races
the float model, the peers and the front in turn; drift is that on feeds/report, which neither fits nor searches have seen.
It prints

* a table of all of them, drift and speed-up over the float model;
* for each peer the largest speed-up of our plans that drift no more, and how many times the peer's that is;
* how far predicted damage and speed-up of the points lay from what the search then measured;
* for MiniLM, the best speed-up over ``quantize_dynamic(per_channel=True)`` at cosine 0.99 and 0.95.

``--simulate`` takes the times that the search's tasks took, and says how long the measuring of candidates would take on 1 to 256
workers, and what bounds it. Exit code 1 where a limit for MiniLM is missed.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from pathlib import Path
from typing import Any

import ffnfold
import numpy as np
from ffnfold.passes.split import load_split
from ffnfold.runtime import Variant, compare, input_specs, parse_limit, race
from ffnfold.runtime.machine import machine
from ffnfold.runtime.processor import products_saturate
from ffnfold.search import SearchJob, search_file
from int8_rows import FLOAT, PER_CHANNEL, ROWS
from int8_table import MAIN
from int8_tools import TOOLS

WANTED = {0.99: 1.2, 0.95: 1.5}  # cosine → speed-up over quantize_dynamic(per_channel=True), MiniLM
_FAR = 0.1  # of damage, beyond which no peer is
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main() -> int:
    """Search, race, tell; exit code 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--models", nargs="+", default=["minilm"], choices=list(MAIN))
    parser.add_argument("--budget", type=float, default=30.0, help="minutes of each search")
    parser.add_argument("--limits", nargs="+", type=float, default=[0.99, 0.95], help="on the cosine of the main output")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=2.5, help="of the race, for each model in it")
    parser.add_argument("--points", type=int, default=14,
                        help="of the front that are raced, about: of those with a cosine of 0.9 and more")
    parser.add_argument("--cache", type=Path, help="of the searches; else DIR/cache")
    parser.add_argument("--simulate", action="store_true", help="how long candidates take on 1 to 256 workers")
    parser.add_argument("--svg", type=Path, metavar="FOLDER", help="draw each model there (needs matplotlib)")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "pareto.json")
    given = parser.parse_args()
    result = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {}
    missed = 0
    for name in given.models:
        found = result.setdefault(name, {})
        if given.simulate:
            found["simulation"] = simulate(given.cache or given.folder / "cache")
        else:
            found |= measured(name, given)
            missed += show(name, found)
            if given.svg is not None:
                draw(name, found, given.svg / f"pareto_{name}.svg")
        given.json.parent.mkdir(exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return min(1, missed)


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Search one model, and race what was found with the peers."""
    place, output, cache = given.folder / name, MAIN[name], given.cache or given.folder / "cache"
    (place / "search").mkdir(exist_ok=True)
    kept: dict[str, Path] = {}
    points: dict[str, dict[str, Any]] = {}
    searches = []
    for limit in given.limits:
        job = SearchJob(place / "model.onnx", place / "search" / "best.onnx", place / "feeds", threads=given.threads,
                        limits=[parse_limit(f"cosine_mean@{output}={limit:g}")], minutes=given.budget, cache=cache,
                        front=place / "search")
        report = search_file(job, lambda message: print(message, file=sys.stderr, flush=True))
        points |= {json.dumps(point["plan"]): point for point in report["points"]}
        kept |= {json.dumps(point["plan"]): Path(point["model"]) for point in report["front"]}
        searches.append({"limit": limit, "minutes": report["seconds"] / 60, "ok": report["ok"], "measured": report["measured"],
                         "reused": report["reused"], "points": len(report["points"]), "plan": report["plan"],
                         "cosine": report["drift"]["outputs"][output]["cosine_mean"], "speedup": report["speedup"]})
    key = f"cosine_mean@{output}"
    front = [point for plan, point in points.items() if plan in kept and not any(
        other["damage"][key] <= point["damage"][key] and other["speedup"] > point["speedup"] for other in points.values())]
    front = sorted(front, key=lambda point: point["speedup"])
    near = [point for point in front if point["damage"][key] <= _FAR] or front
    within = {max((number for number, point in enumerate(near) if point["damage"][key] <= 1 - limit), default=0)
              for limit in given.limits}  # the fastest within each limit
    even = {round(number) for number in np.linspace(0, len(near) - 1, min(given.points, len(near)))}
    front = [near[number] for number in sorted(even | within)]
    models = {f"search {number}": kept[json.dumps(point["plan"])] for number, point in enumerate(front)}
    peers = {row: place / f"{row}.onnx" for row in [*ROWS, *TOOLS] if (place / f"{row}.onnx").exists()}
    rows = raced(place, output, {**peers, **models}, given)
    return {"machine": {**machine("cpu", given.threads, False), "products_saturate": products_saturate()}, "output": output,
            "searches": searches, "rows": rows,
            "front": [{**point, "row": row} for row, point in zip(models, front, strict=True)],
            "prediction": [predicted(point, key) for point in points.values()]}


def raced(place: Path, output: str, paths: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Drift on the feeds that report, and all in one race."""
    split = load_split(place / "feeds", input_specs(ffnfold.load(place / "model.onnx")), True)
    rows = {}
    for key, path in paths.items():
        drift = compare(place / "model.onnx", path, split.report, threads=given.threads)
        rows[key] = {"cosine": drift.outputs[output]["cosine_mean"]}
    variants = [Variant(place / "model.onnx", FLOAT), *(Variant(path, key) for key, path in paths.items())]
    found = race(variants, split.report, threads=given.threads, seconds=given.seconds * len(variants), keep_times=True)
    times = {row["model"]: np.asarray(row["times_ms"]) for row in found["models"]}
    for key in rows:
        ratios = times[FLOAT] / times[key]
        rows[key] |= {"p50_ms": float(np.median(times[key])), "speedup": float(np.median(ratios))}
        if PER_CHANNEL in times:
            rows[key]["of_per_channel"] = float(np.median(times[PER_CHANNEL] / times[key]))
    return {FLOAT: {"cosine": 1.0, "p50_ms": float(np.median(times[FLOAT])), "speedup": 1.0}, **rows}


def predicted(point: dict[str, Any], key: str) -> dict[str, float]:
    """Predicted over measured, of damage and of speed-up."""
    damage = point["damage"][key]
    return {"damage": point["predicted"]["damage"][key] / damage if damage > 1e-9 else 1.0,
            "speedup": point["predicted"]["speedup"] / point["speedup"], "cosine": 1 - damage}


def line(found: dict[str, Any], cosine: float) -> float | None:
    """The largest speed-up of our plans that drift no more than ``cosine``; None where none does."""
    ours = [found["rows"][point["row"]] for point in found["front"]]
    return max((row["speedup"] for row in ours if row["cosine"] >= cosine), default=None)


def show(name: str, found: dict[str, Any]) -> int:
    """Print what was found of one model; 1 if a limit is missed."""
    ours = {point["row"] for point in found["front"]}
    print(f"\n{name}: {found['machine']['cpu']}, {found['machine']['cores']} cores"
          f"{', no VNNI: int8 is slow here' if found['machine']['products_saturate'] else ''}")
    for key, row in sorted(found["rows"].items(), key=lambda item: item[1]["speedup"]):
        share = "" if key in ours or key == FLOAT else _share(found, row)
        print(f"  {key:24} cosine {row['cosine']:.5f}  speed-up {row['speedup']:.3f}  {share}")
    parts = found["prediction"]
    for what in ("damage", "speedup"):
        inside = sum(0.8 <= part[what] <= 1.2 for part in parts)
        print(f"  predicted {what} within 20 % of measured: {inside} of {len(parts)} plans, median ratio "
              f"{float(np.median([part[what] for part in parts])):.2f}")
    if name != "minilm" or PER_CHANNEL not in found["rows"]:
        return 0
    missed = 0
    for cosine, wanted in WANTED.items():
        best = max((found["rows"][row]["of_per_channel"] for row in ours if found["rows"][row]["cosine"] >= cosine), default=0.0)
        missed |= best < wanted
        print(f"  at cosine {cosine}: {best:.3f} of quantize_dynamic(per_channel=True), wanted {wanted}")
    return missed


def _share(found: dict[str, Any], row: dict[str, Any]) -> str:
    ours = line(found, row["cosine"])
    return "no plan of ours drifts so little" if ours is None else f"ours there {ours:.3f}, {ours / row['speedup']:.2f} times its"


def draw(name: str, found: dict[str, Any], path: Path) -> None:
    """Speed-up over 1 − cosine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    ours = [found["rows"][point["row"]] for point in found["front"]]
    axes.plot([max(1 - row["cosine"], 1e-7) for row in ours], [row["speedup"] for row in ours], "o-", label="ffnfold search")
    for key, row in found["rows"].items():
        if not key.startswith("search "):
            axes.plot(max(1 - row["cosine"], 1e-7), row["speedup"], "x")
            axes.annotate(key, (max(1 - row["cosine"], 1e-7), row["speedup"]), fontsize=7)
    axes.set(xscale="log", xlabel=f"1 − cosine of {found['output']}", ylabel="speed-up over float", title=name)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def simulate(cache: Path) -> list[dict[str, float]]:
    """How long the candidates of the cache would take: tasks in order, each to the worker that is free first."""
    tasks: dict[int, list[dict[str, float]]] = {}
    for file in cache.rglob("*.json"):
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["key"].startswith("('alone'") and "seconds" in held["value"]:
            tasks.setdefault(int(held["key"].split(",")[1]), []).append(held["value"])
    rows = []
    for workers in WORKERS:
        parts = max(1, -(-workers // max(1, len(tasks))))
        times = []
        for several in tasks.values():
            moments = max(each["moments"] for each in several)
            size = -(-len(several) // parts)
            for start in range(0, len(several), size):
                part = several[start:start + size]
                fitted = moments if any(each["moments"] or each["seconds"] > moments > 0 for each in part) else 0.0
                times.append(fitted + sum(each["seconds"] - each["moments"] for each in part))
        free = [0.0] * workers
        for seconds in times:
            heapq.heapreplace(free, free[0] + seconds)
        rows.append({"workers": workers, "tasks": len(times), "seconds": max(free), "longest_task": max(times, default=0.0),
                     "speedup": rows[0]["seconds"] / max(free) if rows else 1.0})
        print(f"  {workers:4} workers: {max(free):8.1f} s, {rows[-1]['speedup']:6.2f} times as fast, {len(times)} tasks, "
              f"the longest {rows[-1]['longest_task']:.1f} s")
    return rows


if __name__ == "__main__":
    sys.exit(main())
