"""Speed on the page: latency, the roofline, where the nodes ran, the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.bench import with_ratios
from ...runtime.grid import shape_text
from . import charts
from .section import Cell, Figure, Section, Table, short_names

Row = Mapping[str, Any]


def latency_section(timing: Row) -> Section:
    """Distributions and percentiles of each model at each point of the grid."""
    names = short_names([row["model"] for row in timing["models"]])
    points: dict[str, list[Row]] = {}
    for row in timing["models"]:
        points.setdefault(_point(row), []).append(row)
    figures = []
    for number, (point, raced) in enumerate(points.items()):
        if all("times_ms" in row for row in raced):
            drawing = charts.latency(raced, [names[row["model"]] for row in raced], number)
            where = f"At {point}: the" if point else "The"
            figures.append(Figure(drawing, f"{where} share of runs that were done within a time; marked is the median."))
    place = ["shape"] if len(points) > 1 and any(row["shape"] for row in timing["models"]) else []
    place += ["threads"] if len(points) > 1 and any(row["threads"] for row in timing["models"]) else []
    columns = ["model", *place, "p50, ms", "p90, ms", "p99, ms", "load, ms", "peak memory, MB",
               "speed-up", "95 % from", "to"]
    rows = [[names[row["model"]], *(shape_text(row[key]) if key == "shape" else row[key] for key in place), row["p50_ms"],
             row["p90_ms"], row["p99_ms"], row["load_ms"], None if row["peak_bytes"] is None else row["peak_bytes"] / 1e6,
             *((ratio or {}).get(key) for key in ("speedup", "low", "high"))] for row, ratio in with_ratios(timing)]
    text = ("Runs interleaved in one process. The speed-up is the first model's time divided by this model's in the same round, "
            "the median over rounds with its 95 % bootstrap interval; an interval that reaches below 1 shows no speed-up.")
    return Section("latency", "Latency", text, timing["machine"]["feeds"], figures=figures,
                   tables=[Table("Latency and speed-up", columns, rows)])


def roofline_section(timing: Row) -> Section:
    """The work of each model, and how near to the roof it came."""
    names = short_names([row["model"] for row in timing["models"]])
    rows = timing["models"]
    titles = [f"{names[row['model']]}{f' ({_point(row)})' if _point(row) else ''}" for row in rows]
    columns = ["model", "10⁹ operations", "MB of weights", "operations a byte", "bound by", "bound, ms", "share of p50"]
    table = Table("Work and roof", columns, [
        [title, found["operations"] / 1e9, found["weight_bytes"] / 1e6, found["operations_per_byte"], found["limit"],
         found["bound_ms"], found["reached"]] for title, found in zip(titles, (row["roofline"] for row in rows), strict=True)])
    text = ("Operations of the matrix products and bytes moved at least, against the rate and the bandwidth that ONNX Runtime "
            "reaches on this machine.")
    return Section("roofline", "Roofline", text, timing["machine"]["feeds"], figures=[Figure(charts.roofline(rows, titles))],
                   tables=[table])


def placement_section(timing: Row) -> Section:
    """Nodes by provider, copies, and what fell back to the CPU."""
    names = short_names([row["model"] for row in timing["models"]])
    rows = list({row["model"]: row for row in timing["models"] if row["nodes_by_provider"] is not None}.values())
    kinds = sorted({kind for row in rows for kind in row["nodes_by_provider"]})
    elsewhere = timing["provider"] != "cpu"
    columns = ["model", *(kind.removesuffix("ExecutionProvider") for kind in kinds),
               *(["copies between CPU and device", "compute on the CPU"] if elsewhere else [])]
    counts = [[names[row["model"]], *(row["nodes_by_provider"].get(kind, 0) for kind in kinds),
               *([row["memcpy_nodes"], len(row["fallback_nodes"])] if elsewhere else [])] for row in rows]
    tables = [Table("Nodes by provider", columns, counts)]
    fallen = [[names[row["model"]], each["name"], each["op"]] for row in rows for each in row["fallback_nodes"] or ()]
    if fallen and elsewhere:
        tables.append(Table("Nodes that fell back to the CPU", ["model", "node", "operator"], fallen))
    figures = [Figure(charts.placement([names[row["model"]] for row in rows], [row["nodes_by_provider"] for row in rows]))]
    return Section("placement", "Where the nodes ran", f"Asked for: {timing['provider'].upper()}.", timing["machine"]["feeds"],
                   figures=figures if rows else [], tables=tables)


def machine_section(timing: Row) -> Section:
    """On what it was measured."""
    rows: Sequence[Sequence[Cell]] = [[key.replace("_", " "), _plain(value)] for key, value in timing["machine"].items()]
    return Section("machine", "Machine", "On what and how it was measured.", tables=[Table("Machine", ["what", "value"], rows)])


def _point(row: Row) -> str:
    if "shape" not in row:
        return ""
    threads = f"{row['threads']} threads" if row["threads"] else ""
    return ", ".join(text for text in (shape_text(row["shape"]), threads) if text)


def _plain(value: object) -> Cell:
    return value if isinstance(value, (str, int, float)) or value is None else str(value)
