"""What each command puts on its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.bench import with_ratios
from .output import megabytes, plain
from .page import Report
from .page.section import feeds, worst


def optimize_page(report: Mapping[str, Any], details: Mapping[str, Any], plan: str) -> Report:
    """The page of ``optimize``.

    Args:
        details: ``drift`` and ``timing``, where they were measured.
        plan: as YAML.
    """
    size = report["bytes"]
    summary = [("made from", report["model"]),
               ("size", f"{megabytes(size['before'])} → {megabytes(size['after'])} ({size['after'] / size['before']:.3f} of it)")]
    if report["drift"]:
        summary += [_inputs(report["drift"]), _largest_error(report["drift"])]
    if report["speed"]:
        summary.append(("speed-up", "{speedup:.3f} ({low:.3f} to {high:.3f})".format(**report["speed"])))
    missed = [text for text in report["notes"] if text.startswith("a limit was missed")]
    front, metric = _front(report.get("front", []))
    return Report(Path(report["output"]).name, ok=report["ok"], summary=summary, plan=plan, passes=report["passes"],
                  contributions=plain(report.get("contributions", [])),
                  drift=plain(details.get("drift")), timing=plain(details.get("timing")),
                  bytes={report["model"]: size["before"], report["output"]: size["after"]},
                  equivalence=plain(report["equivalence"]), feeds=report["feeds"], front=front, drift_metric=metric,
                  notes=[text for text in report["notes"] if text not in missed], missed=missed)


def _front(points: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Points of a search with the damage in the place of the drift, that of the first metric that was limited; and what it is."""
    if not points:
        return [], "drift"
    name = next(iter(points[0]["damage"]))
    metric, _, output = name.partition("@")
    title = f"1 − {metric} of {output}" if metric.startswith(("cosine", "top")) else f"damage ({metric} of {output})"
    return [{**plain(point), "drift": point["damage"][name]} for point in points], title


def verify_page(reference: Path, candidate: Path, result: Mapping[str, Any], missed: Sequence[str],
                overflow: str | None) -> Report:
    """The page of ``verify``."""
    summary = [("reference", str(reference)), ("candidate", str(candidate)), _inputs(result), _largest_error(result)]
    blocks = [each for each in result.get("blocks", []) if each["rank"] == 1]
    if blocks:
        summary.append(("block with most damage", f"{blocks[0]['block']} ({blocks[0]['name']})"))
    return Report(f"{candidate.name} against {reference.name}", ok=result["ok"], summary=summary, drift=plain(result),
                  feeds=result["feeds"], missed=missed, notes=[overflow] if overflow else [])


def bench_page(result: Mapping[str, Any], behind: Sequence[str]) -> Report:
    """The page of ``bench``."""
    sizes = {row["model"]: row["bytes"] for row in result["models"]}
    speeds = [(Path(row["model"]).name, ratio) for row, ratio in with_ratios(result) if ratio is not None]
    summary = [("inputs", result["machine"]["feeds"]), ("provider", result["provider"].upper()),
               *((f"{name}, size", megabytes(count)) for name, count in ((Path(each).name, sizes[each]) for each in sizes))]
    if len(speeds) <= 6:
        summary += [(f"{name}, speed-up", f"{ratio['speedup']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
                    for name, ratio in speeds]
    return Report(" against ".join(Path(each).name for each in sizes), ok=not behind if behind else None, summary=summary,
                  timing=plain(result), bytes=sizes, feeds=result["machine"]["feeds"], missed=behind)


def _inputs(drift: Mapping[str, Any]) -> tuple[str, str]:
    return "inputs", f"{feeds(drift['samples'])}, {drift['feeds']}, on {drift['provider'].upper()}"


def _largest_error(drift: Mapping[str, Any]) -> tuple[str, str]:
    """The output that moved most."""
    compared = {name: metrics for name, metrics in drift["outputs"].items() if metrics["nonfinite"] is not None}
    if not compared:
        return "relative error", "no output could be compared"
    most = worst(compared)
    name = next(name for name, metrics in compared.items() if metrics is most)
    return "largest relative error", f"{'not finite' if most['rel_l2'] is None else '{:.4g}'.format(most['rel_l2'])} ({name})"
