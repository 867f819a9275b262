"""Plans that were built and measured, and those of them that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.plan import Plan
from .candidates import Choice
from .goal import Row
from .yardstick import Drift

_SURE = 0.9


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
        drift: on the feeds that choose; parts: on parts of them, which say how sure it is.
        time: as a part of the original's, over all shapes; bytes: of its weights.
        expected: what was predicted.
    """

    choice: Choice
    plan: Plan
    drift: Drift
    time: float
    bytes: int
    expected: Expected
    parts: Sequence[Drift] = ()

    def upper(self, rows: Sequence[Row]) -> tuple[float, ...]:
        """The damage that each row stays below on other feeds of the kind, nine times in ten: Student's t over the parts."""
        from scipy.special import stdtrit  # takes 0.1 s to import

        found = []
        for row, damage in zip(rows, self.damages(rows), strict=True):
            parts = [row.damage(part) for part in self.parts]
            error = 0.0
            if len(parts) > 1 and np.isfinite(parts).all():
                error = float(stdtrit(len(parts) - 1, _SURE) * np.std(parts, ddof=1) / len(parts) ** 0.5)
            found.append(damage + error)
        return tuple(found)

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
