"""Races over a grid: every shape with every number of threads, and what the machine could do at best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .entrant import Variant
from .feeds import Feeds
from .grid import Shape, shape_text
from .roofline import Roof, measure_roof
from .timing import race
from .work import Work, count_work


@dataclass(frozen=True)
class Point:
    """A race of the grid.

    Attributes:
        feeds: inputs; threads: inside an operator, None for ONNX Runtime's choice.
        shape: the shapes asked for, by input; empty where the feeds are real.
    """

    feeds: Feeds
    threads: int | None = None
    shape: Mapping[str, Shape] = field(default_factory=dict)

    def __str__(self) -> str:
        threads = "" if self.threads is None else f"{self.threads} threads"
        return ", ".join(text for text in (shape_text(dict(self.shape)), threads) if text)


def bench(variants: Sequence[Variant], points: Sequence[Point], *, roofline: bool = False,
          progress: Callable[[str], None] = lambda message: None, **options: Any) -> dict[str, Any]:
    """Race ``variants`` at every point.

    Args:
        roofline: say for each model what it computes and moves, and how near it comes to what the machine can do.
        options: of :func:`race`: ``provider``, ``cuda_graph``, ``use_tf32``, ``allow_cpu``, ``seconds``, ``keep_times`` …

    Returns:
        ``bench``'s object: that of the one race, or with several points those of all in one, where each entry of
        ``models`` and ``ratios`` also has its ``shape`` and ``threads``.

    Raises:
        InputError: as :func:`race`, :func:`measure_roof`, :func:`count_work`.
    """
    found = []
    for number, point in enumerate(points, 1):
        where = f"{point}: " if len(points) > 1 else ""
        found.append(race(variants, point.feeds, threads=point.threads, progress=_rounds(progress, where), **options))
        progress(f"{number} of {len(points)} done")
    if roofline:
        _add_rooflines(variants, points, found, options, progress)
    if len(points) == 1:
        return found[0]
    threads = list(dict.fromkeys(point.threads for point in points))
    machine = {**found[0]["machine"], "threads": threads if len(threads) > 1 else threads[0],
               "rounds": min(result["machine"]["rounds"] for result in found)}
    return {"machine": machine, "provider": found[0]["provider"],
            **{what: [{**entry, "shape": {name: list(shape) for name, shape in point.shape.items()}, "threads": point.threads}
                      for point, result in zip(points, found, strict=True) for entry in result[what]]
               for what in ("models", "ratios")}}


def _rounds(progress: Callable[[str], None], where: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(f"{where}round {done} of {total}")


def with_ratios(result: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each entry of ``models`` with that of ``ratios`` that belongs to it; None for the first model at each point."""
    points = len(result["models"]) - len(result["ratios"])
    each = len(result["models"]) // max(1, points)
    ratios = iter(result["ratios"])
    return [(row, next(ratios) if place % each else None) for place, row in enumerate(result["models"])]


def _add_rooflines(variants: Sequence[Variant], points: Sequence[Point], results: Sequence[dict[str, Any]],
                   options: Mapping[str, Any], progress: Callable[[str], None]) -> None:
    provider = options.get("provider", "cpu")
    work: dict[tuple[int, str], Work] = {}
    for place, variant in enumerate(variants):
        for point in points:
            key = (place, shape_text(dict(point.shape)))
            if key not in work:
                progress(f"counting the operations of {variant.title}")
                work[key] = count_work(variant.source, point.feeds[0], provider=provider, threads=point.threads)
    kinds = {kind for each in work.values() for kind in each.operations}
    roofs: dict[int | None, Roof] = {}
    for point, result in zip(points, results, strict=True):
        if point.threads not in roofs:
            progress("measuring what the machine can do")
            roofs[point.threads] = measure_roof(kinds, provider=provider, threads=point.threads,
                                                use_tf32=bool(options.get("use_tf32", False)))
        roof = roofs[point.threads]
        for place, row in enumerate(result["models"]):
            row["roofline"] = {**roof.entry(work[place, shape_text(dict(point.shape))], row["p50_ms"]), **roof.to_json()}
