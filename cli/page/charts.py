"""The charts of the page, as SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .section import worst

_COLOURS = {"#010203": "var(--ink)", "#010204": "var(--faint)", "#010205": "var(--page)",
            **{f"#0a0b{number:02x}": f"var(--series-{number})" for number in range(6)}}
_INK, _FAINT, _PAGE = "#010203", "#010204", "#010205"
SERIES = [f"#0a0b{number:02x}" for number in range(6)]
_MARKERS = "os^DvP"
_INKED = ("axes.labelcolor", "text.color", "xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor")
_STYLE = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "font.family": "sans-serif",
          **dict.fromkeys(_INKED, _INK), "axes.edgecolor": _FAINT, "axes.spines.top": False, "axes.spines.right": False,
          "axes.grid": True, "grid.color": _FAINT, "grid.linewidth": 0.4, "axes.axisbelow": True,
          "axes.formatter.useoffset": False,
          "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False}
_LONGEST = 40


def drift_of_outputs(outputs: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar for the relative error of each output."""
    names = list(outputs)
    return _bars("drift", "Relative error of each output", names, [outputs[name]["rel_l2"] for name in names],
                 "relative error ‖d‖ / ‖r‖")


def drift_of_blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    """What each block causes alone (bars) and the chain up to it (line), at the output that moved most."""
    alone, chain = ([worst(each[which]).get("rel_l2") for each in blocks] for which in ("alone", "chain"))

    def draw(axes: Axes) -> None:
        places = np.arange(len(blocks))
        axes.bar(places, _numbers(alone), color=SERIES[0], width=0.7, label="alone")
        axes.plot(places, _numbers(chain), color=SERIES[1], marker="o", markersize=4, linewidth=1.5,
                  label="chain up to the block")
        step = max(1, len(blocks) // 24)
        axes.set_xticks(places[::step], [str(each["block"]) for each in blocks][::step])
        axes.set_xlabel("FFN block")
        axes.set_ylabel("relative error")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left")
        axes.margins(y=0.18)

    return _draw("block-drift", "Relative error of the output by FFN block: each alone, and the chain up to it", draw, height=3.4)


def latency(rows: Sequence[Mapping[str, Any]], names: Sequence[str], number: int) -> str:
    """The share of runs that were done within a time, for each model."""
    def draw(axes: Axes) -> None:
        for place, (row, name) in enumerate(zip(rows, names, strict=True)):
            times = np.sort(np.asarray(row["times_ms"], float))
            share = np.arange(1, len(times) + 1) / len(times) * 100
            axes.step(times, share, where="post", color=SERIES[place % 6], linewidth=1.6, label=_short(name),
                      linestyle=["-", "--", "-.", ":"][place // 6 % 4])
            axes.plot([row["p50_ms"]], [50], marker=_MARKERS[place % 6], color=SERIES[place % 6], markersize=6)
        first = min(float(np.min(row["times_ms"])) for row in rows)
        last = max(float(np.percentile(row["times_ms"], 99.5)) for row in rows)
        _logarithmic(axes, "x")
        axes.set_xlim(first / 1.05, max(last, first) * 1.1)
        axes.set_ylim(0, 102)
        axes.set_yticks([0, 25, 50, 75, 90, 99])
        axes.set_xlabel("milliseconds, to the 99.5th percentile")
        axes.set_ylabel("% of runs done")
        axes.legend(loc="lower right")

    title = "Latency distribution: share of runs done within a time; marked is the median"
    return _draw(f"latency-{number}", title, draw, height=3.4)


def sizes(names: Sequence[str], counts: Sequence[int]) -> str:
    """A bar for the size of each file."""
    return _bars("file-size", "Size of each model", names, [count / 1e6 for count in counts], "MB")


def placement(names: Sequence[str], nodes: Sequence[Mapping[str, int]]) -> str:
    """Nodes that ran on each provider, a bar a model."""
    kinds = sorted({kind for each in nodes for kind in each})

    def draw(axes: Axes) -> None:
        left = np.zeros(len(names))
        for number, kind in enumerate(kinds):
            counts = np.array([each.get(kind, 0) for each in nodes], float)
            axes.barh(np.arange(len(names)), counts, left=left, color=SERIES[number % 6], height=0.6, edgecolor=_PAGE,
                      label=kind.removesuffix("ExecutionProvider"))
            left += counts
        axes.set_yticks(np.arange(len(names)), [_short(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("nodes executed, after ONNX Runtime's fusions")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _draw("nodes", "Where the nodes of each model ran", draw, height=_height(len(names)))


def roofline(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Operations a second against operations a byte, under the roofs of the machine."""
    roof = rows[0]["roofline"]
    at = np.array([row["roofline"]["operations_per_byte"] for row in rows], float)
    reached = np.array([row["roofline"]["operations"] / row["p50_ms"] / 1e6 for row in rows], float)

    def draw(axes: Axes) -> None:
        ridge = max(roof["matmul_gops"].values()) / roof["read_gbs"]
        span = np.geomspace(min(at.min(), ridge) / 4, max(at.max(), ridge) * 4, 100)
        for number, (kind, rate) in enumerate(roof["matmul_gops"].items()):
            axes.plot(span, np.minimum(rate, span * roof["read_gbs"]), color=_INK, linewidth=1.2,
                      linestyle=["-", "--", ":"][number % 3], label=f"roof, {kind}")
        for number, name in enumerate(names):
            axes.plot([at[number]], [reached[number]], marker=_MARKERS[number % 6], color=SERIES[number % 6], linestyle="none",
                      markersize=8, label=_short(name))
        _logarithmic(axes, "x")
        _logarithmic(axes, "y")
        axes.set_xlabel("operations a byte moved at least")
        axes.set_ylabel("10⁹ operations a second")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _draw("roof", "Operations a second of each model under what the machine can do", draw, height=3.6)


def pareto(front: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Speed-up against drift of the plans on the front."""
    order = sorted(front, key=lambda each: each["drift"])

    def draw(axes: Axes) -> None:
        drift, speed = [each["drift"] for each in order], [each["speedup"] for each in order]
        axes.plot(drift, speed, color=_FAINT, linewidth=1.2)
        axes.plot(drift, speed, linestyle="none", marker="o", color=SERIES[0], markersize=7)
        for number, (x, y) in enumerate(zip(drift, speed, strict=True), 1):
            axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(6, 5))
        axes.set_xlabel(metric)
        axes.set_ylabel("speed-up")
        axes.margins(0.12)

    return _draw("pareto", "Speed-up against drift of the plans on the Pareto front, numbered as in the table", draw, height=3.6)


def _bars(key: str, title: str, names: Sequence[str], values: Sequence[float | None], unit: str) -> str:
    def draw(axes: Axes) -> None:
        bars = axes.barh(np.arange(len(names)), _numbers(values), color=SERIES[0], height=0.6)
        axes.bar_label(bars, ["not finite" if value is None else f"{value:.4g}" for value in values], padding=4)
        axes.set_yticks(np.arange(len(names)), [_short(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.2)

    return _draw(key, title, draw, height=_height(len(names)))


def _draw(key: str, title: str, draw: Callable[[Axes], None], *, height: float) -> str:
    """The SVG element, with a title that screen readers read, its ids its own on the page."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        draw(figure.add_subplot())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()[drawn.getvalue().index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    head = f'<svg class="chart" role="img" aria-labelledby="{key}-title"'
    return re.sub(r"^<svg([^>]*)>", lambda found: f'{head}{found.group(1)}><title id="{key}-title">{escape(title)}</title>', svg)


def _logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic scale for the axis ``x`` or ``y``, with plain numbers on it."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _height(bars: int) -> float:
    return 1.0 + 0.42 * max(1, bars)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else float(value) for value in values]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST:]}"
