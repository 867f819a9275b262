"""The report of a run, as a table, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ..passes.plan import Plan
from .output import console, megabytes, say
from .pages import optimize_page
from .report_folder import write_folder

_METRICS = ("cosine_mean", "cosine_min", "rel_l2", "max_abs", "kl_mean", "top1")


def print_report(report: dict[str, Any]) -> None:
    """One table of what happened, and the notes."""
    say(f"{report['model']} → {report['output']}")
    table = Table("what", "result")
    for what, result in rows(report):
        table.add_row(what, result)
    console.print(table)
    for name, reason, count in refusals(report):
        say(f"  {name} left {count} alone: {reason}")
    for note in report["notes"]:
        say(note, style="yellow")


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as pairs of texts."""
    found = []
    if "blocks" in report:
        found.append(("FFN blocks", str(report["blocks"])))
    for each in report["passes"]:
        kind = "exact" if each["exact"] else "approximate"
        found.append((f"{each['name']} ({kind})", f"fired {each['fired']}, refused {len(each['refused'])}, "
                                                  f"{each['seconds']:.1f} s"))
    size = report["bytes"]
    found.append(("size", f"{megabytes(size['before'])} → {megabytes(size['after'])} "
                          f"({size['after'] / size['before']:.3f} of it)"))
    found += _equivalence(report["equivalence"])
    if report["drift"]:
        for name, metrics in report["drift"]["outputs"].items():
            shown = ", ".join(f"{key} {metrics[key]:.6g}" for key in _METRICS if metrics.get(key) is not None)
            found.append((f"drift of {name}", f"{shown} ({report['feeds']} feeds)"))
    if report["speed"]:
        speed = report["speed"]
        found.append(("speed-up", f"{speed['speedup']:.2f}× (95 % interval {speed['low']:.2f} to {speed['high']:.2f})"))
    found.append(("within limits", "yes" if report["ok"] else "NO"))
    return found


def _equivalence(report: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the exact passes changed in the graph, and how far that moved the outputs."""
    if report is None:
        return []
    found = [("nodes (exact passes)", "{before} → {after}".format(**report["nodes"]))]
    if report["executed"] is not None:
        changed = ", ".join(f"{op} {counts['before']} → {counts['after']}" for op, counts in report["operators"].items())
        found.append(("executed by ONNX Runtime", "{before} → {after}".format(**report["executed"])
                      + (f" ({changed})" if changed else "")))
    numbers = {kind: each for kind, each in report["differences"].items() if isinstance(each, float)}
    if numbers:
        worst = max(numbers, key=lambda kind: numbers[kind])
        found.append(("largest difference", f"{numbers[worst]:.1e} of an output's largest number, on {worst} inputs "
                                            f"({len(numbers)} kinds of inputs)"))
    return found


def _contribution(row: Mapping[str, Any]) -> str:
    drift = max((found["rel_l2"] for found in row["drift"].values() if found["rel_l2"] is not None), default=0.0)
    return (f"| {row['name']} | {megabytes(row['bytes'])} | {drift:.2e} | {max(row['added'].values(), default=0.0):.2e} | "
            f"{row['speed']['speedup']:.2f}× | {row['gained']['speedup']:.2f}× ({row['gained']['low']:.2f} to "
            f"{row['gained']['high']:.2f}) |")


def _difference(value: float | str | None) -> str:
    return "not taken by the model" if value is None else value if isinstance(value, str) else f"{value:.1e}"


def refusals(report: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Pass, reason and how often, most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for each in report["passes"]:
        for refused in each["refused"]:
            key = (each["name"], refused["reason"])
            counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in sorted(counts.items(), key=lambda item: -item[1])]


def write_report(report: dict[str, Any], plan: Plan, folder: Path) -> None:
    """Write ``report.json``, ``report.md``, ``report.html`` and ``plan.yaml`` into ``folder`` (made if need be).

    ``details`` of the report go into ``details.json`` and onto the page, and are taken out of ``report``.

    Raises:
        InputError: it cannot be written there.
    """
    details = report.pop("details", {})
    page = optimize_page(report, details, plan.to_yaml())
    write_folder(folder, report, page, details=details,
                 texts={"report.md": markdown(report, plan), "plan.yaml": plan.to_yaml()})


def markdown(report: dict[str, Any], plan: Plan) -> str:
    """The report as a page."""
    lines = [f"# {Path(report['output']).name}", "", f"Made from `{report['model']}`.", "", "| what | result |", "| --- | --- |"]
    lines += [f"| {what} | {result} |" for what, result in rows(report)]
    lines += ["", "## Plan", "", "```yaml", plan.to_yaml().rstrip(), "```"]
    if report.get("contributions"):
        lines += ["", "## What each pass contributed", "",
                  "| after the pass | size | largest rel_l2 of an output | added | speed-up | by this pass |",
                  "| --- | --- | --- | --- | --- | --- |", *(_contribution(each) for each in report["contributions"]),
                  "", f"Feeds it was measured on: {report['contributions'][0]['samples']}."]
    if refusals(report):
        lines += ["", "## Left alone", ""]
        lines += [f"* {name}: {reason} ({count})" for name, reason, count in refusals(report)]
    if report["equivalence"] and report["equivalence"]["differences"]:
        lines += ["", "## Before and after the exact passes", "", f"{', '.join(report['equivalence']['passes'])}:", "",
                  "| inputs | largest difference |", "| --- | --- |"]
        lines += [f"| {kind} | {_difference(value)} |" for kind, value in report["equivalence"]["differences"].items()]
    if report["notes"]:
        lines += ["", *(f"* {note}" for note in report["notes"])]
    if "machine" in report:
        lines += ["", "## Machine", "", *(f"* {key}: {value}" for key, value in report["machine"].items())]
    return "\n".join(lines) + "\n"
