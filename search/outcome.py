"""What a search leaves behind: the model, its plan, the front."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..graph.errors import InputError
from ..graph.model import Model
from ..passes.fitting.kept_fits import Fits
from ..passes.optimize import Job, optimize_file
from .front import Point, front_of
from .goal import OWN, WHOLE, Row
from .job import SearchJob
from .scoring import Bench
from .yardstick import Yardstick, load_score


def write_best(job: SearchJob, bench: Bench, best: Point, fits: Fits, progress: Callable[[str], None]) -> dict[str, Any]:
    """Write the model of ``best`` as ``optimize`` would, and report as it does; limits are checked on feeds that report."""
    own = [each for each in job.limits if each.metric in OWN]
    report = optimize_file(
        Job(job.model, job.output, best.plan, data=job.data, provider=job.target, threads=job.threads, allow_cpu=True,
            limits=[each for each in job.limits if each not in own], logits=job.all_logits, strict=job.strict,
            detailed=job.detailed, external=job.external, split=bench.split, fits=fits), progress)
    missed = []
    if (job.perplexity is not None or job.score is not None) and job.output.exists():
        yardstick = Yardstick(bench.workshop.original, bench.split.report, provider=job.target, threads=job.threads,
                              perplexity=job.perplexity, score=load_score(job.score) if job.score else None)
        report["own"] = yardstick.measure(Model.load(job.output))[WHOLE]
        values = [(limit, report["own"][limit.metric]) for limit in own]
        missed += [f"{limit.metric} is {value}, should be at most {limit.value:g}" for limit, value in values
                   if not limit.met(value)]
    report["speedup"] = 1 / best.time
    if job.min_speedup is not None and report["speedup"] < job.min_speedup:
        missed.append(f"the speed-up is {report['speedup']:.3f}, should be at least {job.min_speedup:g}")
    if job.max_bytes is not None and report["bytes"]["after"] > job.max_bytes:
        missed.append(f"the size is {report['bytes']['after']} bytes, should be at most {job.max_bytes}")
    report["notes"] += [f"a limit was missed: {sentence}" for sentence in missed]
    report["ok"] = report["ok"] and not missed
    return report


def add_front(report: dict[str, Any], best: Point, points: Sequence[Point], rows: Sequence[Row]) -> list[Point]:
    """Add ``front``, with the best point in it whatever beats it, and ``points``; gives the front."""
    front = front_of(points, rows)
    if best not in front:
        front = sorted([*front, best], key=lambda point: -point.time)
    report["front"] = [point.to_json(rows, point is best) for point in front]
    report["points"] = [point.to_json(rows, point is best) for point in points]
    return front


def beside(job: SearchJob) -> list[Path]:
    """``plan.yaml`` and ``front.json`` beside the model, where they are to be written."""
    return [job.output.parent / name for name in ("plan.yaml", "front.json")] if job.beside else []


def write_beside(job: SearchJob, best: Point, report: dict[str, Any], machine: str) -> None:
    """Write ``plan.yaml`` and ``front.json`` beside the model."""
    plan, front = beside(job)
    _write(plan, best.plan.to_yaml())
    told = {"model": str(job.model), "target": job.target, "machine": machine, "front": report["front"],
            "points": report["points"]}
    _write(front, json.dumps(told, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror}): choose another folder") from None
