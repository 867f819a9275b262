"""Plans that were built and measured, and those of them that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..passes.plan import Plan
from .candidates import Choice
from .goal import Row
from .yardstick import Drift


@dataclass(frozen=True)
class Expected:
    """What was predicted of a plan before it was built.

    Attributes:
        damages: one for each row; time: as a part of the original's.
    """

    damages: tuple[float, ...]
    time: float


@dataclass(frozen=True)
class Point:
    """A plan and what it costs and gains.

    Attributes:
        choice, plan: what it is.
        drift: on the feeds that choose; time: as a part of the original's, over all shapes; bytes: of its weights.
        expected: what was predicted.
    """

    choice: Choice
    plan: Plan
    drift: Drift
    time: float
    bytes: int
    expected: Expected

    def damages(self, rows: Sequence[Row]) -> tuple[float, ...]:
        """The damage of each row."""
        return tuple(row.damage(self.drift) for row in rows)

    def to_json(self, rows: Sequence[Row], chosen: bool) -> dict[str, Any]:
        """An entry of ``front``."""
        return {"plan": self.plan.entries(), "choice": {str(unit): str(each) for unit, each in sorted(self.choice.items())},
                "drift": self.drift, "speedup": 1 / self.time, "bytes": self.bytes, "chosen": chosen,
                "predicted": {"speedup": 1 / self.expected.time, "damage": _named(rows, self.expected.damages)},
                "damage": _named(rows, self.damages(rows))}


def _named(rows: Sequence[Row], damages: Sequence[float]) -> dict[str, float]:
    return {f"{row.metric}@{row.output}": value for row, value in zip(rows, damages, strict=True)}


def front_of(points: Sequence[Point], rows: Sequence[Row]) -> list[Point]:
    """The points that no other beats in all damages, in time and in bytes; the fastest last."""
    found = []
    for point in points:
        own = (*point.damages(rows), point.time, point.bytes)
        beaten = any(other is not point and all(a <= b for a, b in zip(sizes, own, strict=True)) and sizes != own
                     for other, sizes in ((other, (*other.damages(rows), other.time, other.bytes)) for other in points))
        if not beaten:
            found.append(point)
    return sorted(found, key=lambda point: -point.time)
