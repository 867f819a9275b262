"""What is asked of the integer program: the goal itself, and limits around it that draw the front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .candidates import Candidate, Choice
from .choice import Bound, Sizes
from .front import Expected, Point
from .goal import Row
from .job import SearchJob
from .prediction import Damage, Time

MARGIN = 0.95  # of a limit on the damage, on the feeds that choose: others report
_AROUND = (0.5, 2.0, 0.25, 4.0, 0.1, 8.0, 0.04, 16.0, 32.0)
_SPEEDS = (0.95, 1.1, 0.9, 1.2, 0.85, 1.35, 0.8, 1.5)
_MOST = 6  # plans that are built for the goal; for another level half of them
_GOAL_FIRST = 2  # plans for the goal after which the others have their turns too
_NO_SLACK = 0.02  # by how much the limit on time or size is kept


@dataclass(frozen=True)
class Level:
    """Limits for one call of the integer program.

    Attributes:
        damage: of the limits on damage, the factor; None: damage is to be as small as it can be.
        time: as a part of the original's, at most; None: it is to be as small as it can be.
        bytes: at most.
        most: how many plans may be built for it.
    """

    damage: float | None
    time: float | None
    bytes: float | None
    most: int = _MOST // 2


def levels_of(job: SearchJob) -> list[Level]:
    """The goal of ``job`` first."""
    size = None if job.max_bytes is None else float(job.max_bytes)
    if job.limits:
        return [Level(MARGIN, None, size, _MOST), *(Level(MARGIN * factor, None, size) for factor in _AROUND)]
    if job.min_speedup is not None:
        time = (1 - _NO_SLACK) / job.min_speedup
        return [Level(None, time, size, _MOST), *(Level(None, time / factor, size) for factor in _SPEEDS)]
    assert size is not None
    return [Level(None, None, size, _MOST), *(Level(None, None, size / factor) for factor in _SPEEDS)]


def turn(number: int, tried: int, most: int) -> tuple[float, int]:
    """When a level has its next turn, the smallest first: the goal three times, then all of them evenly."""
    return (max(0, tried - _GOAL_FIRST) if number == 0 else tried) / most, number


@dataclass
class Problem:
    """All that is known of the units, and what it says of a choice.

    Attributes:
        units: what may become of each.
        rows, laws: what is limited, and how damage adds up there.
        slack: of each row, the damage over what it is at most within its error, usually.
        clock: how time adds up; bytes_of: by how much each form changes the size, ``base_bytes`` before.
    """

    units: Mapping[int, Sequence[Candidate]]
    rows: Sequence[Row]
    laws: Sequence[Damage]
    clock: Time
    bytes_of: Sizes
    base_bytes: int
    slack: dict[Row, float] = field(default_factory=dict)

    def learn(self, points: Sequence[Point]) -> None:
        """Correct all laws by what was measured."""
        for row, law in zip(self.rows, self.laws, strict=True):
            law.learn([(point.choice, row.damage(point.drift)) for point in points])
        self.clock.learn([(point.choice, point.time) for point in points])
        for number, row in enumerate(self.rows):
            shares = [point.damages(self.rows)[number] / upper for point in points
                      if 1e-9 < (upper := point.upper(self.rows)[number]) < math.inf]
            self.slack[row] = float(np.median(shares)) if shares else 1.0

    def expected(self, choice: Choice) -> Expected:
        """What a choice will cost and gain."""
        return Expected(tuple(law.of(choice) for law in self.laws), self.clock.of(choice))

    def program(self, level: Level) -> tuple[Sizes, list[Bound]]:
        """Costs and bounds for :func:`~.choice.choose`."""
        saved = self.clock.sizes()
        time = {key: -value for key, value in saved.items()}
        bounds = []
        if level.bytes is not None:
            bounds.append(Bound(self.bytes_of, level.bytes - self.base_bytes))
        if level.time is not None:
            bounds.append(Bound(time, level.time - self.clock.level))
        if level.damage is None:
            return self._harm(time), bounds
        for row, law in zip(self.rows, self.laws, strict=True):
            assert row.limit is not None
            sure = min(1.0, self.slack.get(row, 1.0) / MARGIN)
            bounds.append(Bound(law.sizes(), law.sum_at(row.limit * level.damage * sure)))
        return time, bounds

    def best(self, points: Sequence[Point], job: SearchJob) -> Point:
        """The best point for ``job`` of those measured; the nearest to its limits where none keeps them."""
        def excess(point: Point) -> float:
            sure = zip(self.rows, point.damages(self.rows), point.upper(self.rows), strict=True)
            over = [max(damage / MARGIN, upper) / max(row.limit, 1e-300) - 1 for row, damage, upper in sure
                    if row.limit is not None]
            if job.max_bytes is not None:
                over.append(point.bytes / job.max_bytes - 1)
            if not job.limits and job.min_speedup is not None:
                over.append(point.time * job.min_speedup - 1)
            return max(0.0, *over, 0.0)

        def value(point: Point) -> tuple[float, float]:
            harm = sum(damage for damage in point.damages(self.rows) if math.isfinite(damage))
            return (point.time, harm) if job.limits else (harm, point.time)

        return min(points, key=lambda point: (excess(point), *value(point)))

    def _harm(self, time: Mapping[tuple[int, Candidate], float]) -> Sizes:
        """All rows together, each by its own size, and very little of the time, which settles ties."""
        sizes = [law.sizes() for law in self.laws]
        scales = [max((value for value in each.values() if math.isfinite(value)), default=0.0) or 1.0 for each in sizes]
        return {key: sum(each[key] / scale for each, scale in zip(sizes, scales, strict=True)) + 1e-6 * time[key] for key in time}
