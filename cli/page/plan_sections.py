"""What was made, on the page: the plan, its sizes, the front it was chosen from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import charts
from .section import Figure, Section, Table, short_names


def size_section(sizes: Mapping[str, int]) -> Section:
    """Bytes of each model."""
    names, first = short_names(list(sizes)), next(iter(sizes.values()))
    table = Table("Size of the files, external data included", ["model", "bytes", "MB", "share of the first"],
                  [[names[name], count, count / 1e6, count / first if first else None] for name, count in sizes.items()])
    drawing = charts.sizes([names[name] for name in sizes], list(sizes.values()))
    return Section("size", "Size", figures=[Figure(drawing)], tables=[table])


def front_section(front: Sequence[Mapping[str, Any]], metric: str, feeds: str | None) -> Section:
    """Speed-up against drift."""
    order = sorted(front, key=lambda each: float(each["drift"]))
    table = Table("Plans on the front", ["number", metric, "speed-up", "MB", "plan"],
                  [[number, each["drift"], each["speedup"], each["bytes"] / 1e6, _text(each["plan"])]
                   for number, each in enumerate(order, 1)])
    return Section("front", "Pareto front", "Plans of which none is better in both speed and drift.", feeds,
                   figures=[Figure(charts.pareto(order, metric))], tables=[table])


def plan_section(plan: str, passes: Sequence[Mapping[str, Any]], contributions: Sequence[Mapping[str, Any]] = (),
                 feeds: str | None = None) -> Section:
    """The plan file, what each pass did and contributed, and what it left alone."""
    rows = [[each["name"], "exact" if each["exact"] else "approximate", each["fired"], len(each["refused"]), each["seconds"]]
            for each in passes]
    tables = [Table("Passes", ["pass", "kind", "fired", "refused", "seconds"], rows)] if rows else []
    if contributions:
        tables.append(_contributions(contributions))
    counts: dict[tuple[str, str], int] = {}
    for each in passes:
        for refused in each["refused"]:
            key = (each["name"], refused["reason"])
            counts[key] = counts.get(key, 0) + 1
    if counts:
        tables.append(Table("Left alone", ["pass", "reason", "times"], [[*key, count] for key, count in counts.items()]))
    return Section("plan", "Plan", "The passes, in order, as a plan file.", feeds if contributions else None, code=plan,
                   tables=tables)


def _contributions(contributions: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each pass that changed the model; the drift is that of the output that moved most in the end."""
    last = {name: found["rel_l2"] or 0.0 for name, found in contributions[-1]["drift"].items()}
    output = max(last, key=lambda name: last[name], default="")
    rows = [[each["name"], each["bytes"] / 1e6, each["drift"].get(output, {}).get("rel_l2"), each["added"].get(output),
             each["speed"]["speedup"], each["gained"]["speedup"], each["gained"]["low"], each["gained"]["high"]]
            for each in contributions]
    return Table(f"What each pass contributed (drift: rel_l2 of {output}, on {contributions[0]['samples']} feeds)",
                 ["after the pass", "MB", "drift", "added drift", "speed-up", "by this pass", "from", "to"], rows)


def _text(plan: object) -> str:
    """A plan's entries on one line, as ``-p`` takes them."""
    if isinstance(plan, list):
        return " · ".join(_text(each) for each in plan)
    if isinstance(plan, Mapping):
        return ", ".join(f"{name}:{','.join(f'{key}={value}' for key, value in (options or {}).items())}"
                         for name, options in plan.items())
    return str(plan)
