"""The drift of each form of each unit by itself, as much of it as there is time for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..passes.fitting.evidence import OutOfTimeError
from .candidates import HEAD, KEEP, OTHERS, Candidate, name_of, spread_out
from .job import SearchJob
from .records import Records
from .scoring import Bench, Scored
from .workers import cluster, local_pool, run_tasks, tasks_of

_UNFITTED = 0.6  # part of the time for those that need no fit
_MAPS = 0.6  # part of what is left of it in a short search for affine maps alone, whose moments take less time than neurons'
Several = dict[int, list[Candidate]]


@dataclass
class Alone:
    """What measures them.

    Attributes:
        candidates: unit → what may become of it, to keep it first.
    """

    job: SearchJob
    bench: Bench
    records: Records
    candidates: Several
    progress: Callable[[str], None]

    @property
    def short(self) -> bool:
        """Whether there is little time."""
        return self.bench.setting.short

    def measure(self, saved: Mapping[tuple[int, Candidate], float], until: float) -> None:
        """Measure what is not known, until the time (of ``time.monotonic()``) is over.

        Args:
            saved: what a form of a unit saves of the time of the model; where time is short those that save most are known.
        """
        start = time.monotonic()
        first = start + _UNFITTED * max(0.0, until - start)
        self._measure_together(saved, first)
        wanted = self.unknown()
        cheap = {unit: [each for each in several if not each.fitted] for unit, several in promising(wanted, saved).items()}
        fitted = {unit: [each for each in several if each.fitted and each.parts is None] for unit, several in wanted.items()}
        maps = {unit: [each for each in several if self.short and each.neurons == 0] for unit, several in fitted.items()}
        rest = {unit: [each for each in several if each not in maps[unit]] for unit, several in fitted.items()}
        self._score(cheap, first)
        now = time.monotonic()
        self._score(maps, now + _MAPS * (until - now))
        self._score(rest, until)

    def known(self) -> dict[tuple[int, Candidate], Scored]:
        """What was measured of each unit and form; with ``units`` where it is what those do together (see :mod:`shares`).

        What was measured together goes before what of the same was measured alone, so that its parts are all of it.
        """
        found = {}
        shared = self.shared()
        for unit, several in self.candidates.items():
            for each in several:
                units = shared.get(each, [])
                together = self.records.get("together", units, str(each)) if unit in units else None
                alone = self.records.get("alone", unit, str(each)) if each != KEEP else None
                if together is not None and "drift" in together:
                    found[unit, each] = {**together, "units": units}
                elif alone is not None and "drift" in alone:
                    found[unit, each] = alone
        return found

    def unknown(self) -> Several:
        """Unit → candidates that are to be measured by themselves."""
        shared = self.shared()
        return {unit: [each for each in several if each != KEEP and unit not in shared.get(each, ())
                       and self.records.get("alone", unit, str(each)) is None]
                for unit, several in self.candidates.items()}

    def shared(self) -> dict[Candidate, list[int]]:
        """In a short search the forms that need no fit and the blocks that may take them, where some were not measured alone."""
        found: dict[Candidate, list[int]] = {}
        for unit, several in self.candidates.items():
            for each in several if self.short and unit not in (OTHERS, HEAD) else ():
                if each.form and not each.fitted:
                    found.setdefault(each, []).append(unit)
        return {each: units for each, units in found.items()
                if len(units) > 1 and any(self.records.get("alone", unit, str(each)) is None for unit in units)}

    def unknown_together(self) -> list[Candidate]:
        """Of the shared forms those that are to be measured."""
        return [each for each, units in self.shared().items() if self.records.get("together", units, str(each)) is None]

    def _measure_together(self, saved: Mapping[tuple[int, Candidate], float], limit: float) -> None:
        """Of the shared forms the one that saves most in any case."""
        order = sorted(self.shared().items(), key=lambda item: -sum(saved.get((unit, item[0]), 0.0) for unit in item[1]))
        for number, (each, units) in enumerate(order):
            if self.records.get("together", units, str(each)) is None and (not number or time.monotonic() < limit):
                self.progress(f"drift of all blocks together: {each}")
                self.records.put(self.bench.score_together(dict.fromkeys(units, each)), "together", units, str(each))

    def _score(self, wanted: Several, limit: float) -> None:
        """Measure what is ``wanted`` before ``limit``."""
        wanted = {unit: spread_out(several) if several[0].fitted else several for unit, several in wanted.items() if several}

        def keep(unit: int, each: Candidate, scored: Scored) -> None:
            self.records.put(scored, "alone", unit, str(each))

        if not wanted:
            return
        if self.job.scheduler is None and self.job.workers <= 1:
            self.score_here(wanted, limit, keep)
            return
        if time.monotonic() < limit:
            self._score_elsewhere(wanted, limit, keep)
        unit, several = next(iter(wanted.items()))
        if not several[0].fitted and self.records.get("alone", unit, str(several[0])) is None:  # it is measured in any case
            self.score_here({unit: several[:1]}, limit, keep)

    def _score_elsewhere(self, wanted: Several, limit: float, keep: Callable[[int, Candidate, Scored], None]) -> None:
        if self.job.scheduler is not None:
            with cluster(self.job.scheduler, self.bench.setting) as (pool, workers, setting):
                run_tasks(tasks_of(wanted, workers()), setting, pool, keep, limit, workers)
        else:
            run_tasks(tasks_of(wanted, self.job.workers), self.bench.setting, lambda: local_pool(self.job.workers), keep, limit,
                      lambda: self.job.workers)

    def score_here(self, wanted: Several, limit: float, keep: Callable[[int, Candidate, Scored], None]) -> None:
        """One after the other, each unit in its part of the time that is left, so that the last have their turn too.

        Moments that are not there in time are given up: what is left of the budget is for plans. What comes first is measured in
        any case if it takes none.
        """
        for number, (unit, several) in enumerate(wanted.items()):
            now = time.monotonic()
            share = now + (limit - now) / (len(wanted) - number)
            for place, each in enumerate(several):
                if time.monotonic() > share and (number or place or each.fitted):
                    break
                self.progress(f"drift of {name_of(unit)}: {each}")
                try:
                    scored = self.bench.score(unit, each, limit)
                except OutOfTimeError:
                    return
                keep(unit, each, scored)


def promising(wanted: Several, saved: Mapping[tuple[int, Candidate], float]) -> Several:
    """The same, units first whose forms save most time, blocks that are left out not counted."""
    most = {unit: max((saved.get((unit, each), 0.0) for each in several if not each.removed), default=0.0)
            for unit, several in wanted.items()}
    return {unit: wanted[unit] for unit in sorted(wanted, key=lambda unit: -most[unit])}
