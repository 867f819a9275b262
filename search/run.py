"""The search: measure each form alone, choose, build what was chosen, measure it, learn, choose again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..graph.errors import BrokenByPass, InputError
from ..graph.model import Model
from ..graph.places import check_file
from ..passes.fitting.kept_fits import Fits
from ..passes.optimize import Job, check_apart, check_places
from ..passes.plan import Plan
from ..passes.runner import run_plan
from .alone import Alone
from .candidates import KEEP, MEANING, Candidate, Choice, plan_of
from .choice import choose, text_of
from .estimate import estimate
from .front import Expected, Point
from .front_models import FrontModels
from .goal import OWN, Row, rows_of
from .job import SearchJob
from .latency import race_whole
from .levels import Level, Problem, levels_of, turn
from .outcome import add_front, beside, write_beside, write_best
from .prediction import Damage, Time
from .records import Records, default_folder
from .savings import Savings
from .scoring import Bench, Setting, weight_bytes
from .setup import identity_of, traffic_of
from .shares import bytes_of, damages_of

_SHORT = 10.0  # minutes; below, fewer widths are tried
_TIMED = 0.3  # part of the budget after which no further form is timed in the whole model, but for the first of each unit
_ALONE = 0.6  # part of the budget after which no further form is measured alone
_FASTER = 0.98  # a form must take less of the time of a block to be worth its drift
Progress = Callable[[str], None]


class Search:
    """One search. See :func:`search_file`."""

    def __init__(self, job: SearchJob, progress: Progress) -> None:
        if not job.limits and job.min_speedup is None and job.max_bytes is None:
            raise InputError("say what the model has to be: give --max-drift, --min-speedup or --max-bytes")
        check_places(Job(job.model, job.output, Plan(()), data=job.data))
        for path in beside(job):
            check_file(path, "the result", [job.model, job.data])
        self.job, self.progress = job, progress
        self._until = time.monotonic() + 60 * job.minutes
        self._began = time.monotonic()
        self.setting = Setting(job.model, job.data, job.target, job.threads, job.perplexity, job.score,
                               job.all_logits, short=job.minutes < _SHORT)
        progress(f"reading {job.model}")
        self.bench = Bench(self.setting, progress)
        check_apart(job.output, self.bench.workshop.original)
        self.bench.yardstick.check()
        self.rows = self._check_limits()
        self.traffic = traffic_of(job, self.bench.workshop.original, self.bench.split.choose)
        folder = job.cache or default_folder()
        machine, identity, source = identity_of(job, self.bench)
        self.records = Records(folder / identity)
        where = machine, MEANING, job.target, job.threads, [(each.name, each.weight) for each in self.traffic]
        self.savings = Savings(self.bench.workshop, self.traffic, self.records, Records(folder / "latency"), where, progress)
        self.fits = Fits(folder / identity / "fits")
        self.candidates = self.bench.workshop.candidates(few=self.setting.short)
        self.measuring = Alone(job, self.bench, self.records, self.candidates, progress)
        self.points: dict[str, Point] = {}
        self._refused = ""
        self.models: FrontModels | None = None
        self._known_by = identity, source

    def _check_limits(self) -> list[Row]:
        for each in self.job.limits:
            if each.metric in OWN and getattr(self.job, each.metric) is None:
                raise InputError(f"limit on {each.metric}: say how it is measured, with --{each.metric}")
        return rows_of(self.job.limits, self.bench.yardstick.outputs, self.bench.yardstick.logits)

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self._until

    def run(self) -> dict[str, Any]:
        """Search, write the best model, and report."""
        if self.job.front is not None:
            self.models = FrontModels(self.job.front, *self._known_by, self.job.external)
        try:
            self._latency()
            self._alone()
            self._explore()
            return self._finish()
        finally:
            if self.models is not None:
                self.models.close()

    def _latency(self) -> None:
        self.savings.measure(self.candidates, self._began + _TIMED * 60 * self.job.minutes)
        self.saved = self.savings.saved
        for unit, several in self.candidates.items():
            slow = (1 - _FASTER) * max((value for (other, _), value in self.saved.items() if other == unit), default=0.0)
            self.candidates[unit] = [each for each in several if each == KEEP or (
                (unit, each) in self.saved and (self.saved[unit, each] > slow or self.job.max_bytes is not None))]

    def _alone(self) -> None:
        self.measuring.measure(self.saved, self._began + _ALONE * 60 * self.job.minutes)
        self.alone = self.measuring.known()
        for unit, several in self.candidates.items():
            self.candidates[unit] = [KEEP, *(each for each in several if {(unit, part) for part in each.parts or (each,)}
                                             <= set(self.alone))]

    def _explore(self) -> None:
        laws = []
        for row in self.rows:
            alone = damages_of(self.alone, row)
            laws.append(Damage({(unit, each): sum(alone[unit, part] for part in _measured(each))
                                for unit, several in self.candidates.items() for each in several}))
        size = bytes_of(self.alone, self.bench.workshop.blocks)
        sizes = {(unit, each): sum(size[unit, part] * share for part, share in self._shares(unit, each))
                 for unit, several in self.candidates.items() for each in several}
        clock = Time(self.savings.base, {(unit, each): self.saved[unit, each]
                                                         for unit, several in self.candidates.items() for each in several})
        self.problem = Problem(self.candidates, self.rows, laws, clock, sizes, weight_bytes(self.bench.workshop.base))
        self._visit(dict.fromkeys(self.candidates, KEEP))
        levels = levels_of(self.job)
        self._visit_unfitted(levels[0])
        tried = dict.fromkeys(range(len(levels)), 0)
        while (choice := self._next(levels, tried)) is not None:
            self._visit(choice)
        if len(self.points) == 1:
            self._visit_late(levels)

    def _next(self, levels: Sequence[Level], tried: dict[int, int]) -> Choice | None:
        """What to build next. What is known of plans costs no time, and the laws are better for it."""
        for number in sorted(tried, key=lambda number: turn(number, tried[number], levels[number].most)):
            if tried[number] < levels[number].most:
                choice = choose(self.candidates, *self.problem.program(levels[number]))
                if choice is not None and self._worth_it(choice):
                    tried[number] += 1
                    return choice
        return None

    def _visit_late(self, levels: Sequence[Level]) -> None:
        """Where measuring took the whole budget: a search that knows something faster does not end without it.

        With and without blocks that are left out it is what reaches the goal, or else the first level around it that can be.
        """
        for removed in (False, True):
            any(self._visit_unfitted(level, removed=removed, late=True) for level in levels)

    def _visit_unfitted(self, goal: Level, *, removed: bool = False, late: bool = False) -> bool:
        """Whether what needs no fit reaches a level; the best of it is built where it is new.

        It comes first, integers above all: it drifts little on any data, and is the least that a search must beat.

        Args:
            removed: blocks may be left out, too.
            late: it is built even where the budget is spent.
        """
        plain = {unit: [each for each in several if not each.fitted and (removed or not each.removed)]
                 for unit, several in self.candidates.items()}
        choice = choose(plain, *self.problem.program(goal))
        if choice is not None and self._worth_it(choice, late=late):
            self._visit(choice)
        return choice is not None

    def _worth_it(self, choice: Choice, *, late: bool = False) -> bool:
        """Whether a choice is new, and known already or to be built in time."""
        return text_of(choice) not in self.points and (late or not self.over or not self._unbuilt(choice))

    def _unbuilt(self, choice: Choice) -> bool:
        return self.records.get("built", self._plan(choice).to_yaml(), self.savings.where) is None

    def _shares(self, unit: int, each: Candidate) -> list[tuple[Candidate, float]]:
        """What was measured of a candidate, and how much of it: of a pair only the neurons left change their form."""
        if each.parts is None:
            return [(part, 1.0) for part in _measured(each)]
        assert each.neurons is not None
        return list(zip(each.parts, (1.0, each.neurons / self.bench.workshop.blocks[unit].d_ff), strict=True))

    def _visit(self, choice: Choice) -> None:
        """Build and measure a choice, and learn from it."""
        self.points[text_of(choice)] = self.measured(choice, self.problem.expected(choice))
        self.problem.learn([point for point in self.points.values() if math.isfinite(point.time)])

    def measured(self, choice: Choice, expected: Expected) -> Point:
        """The model of a choice, built and measured, or as it was measured before; its time is infinite where it is refused."""
        plan = self._plan(choice)
        found = self.records.measure(partial(self._build, choice, plan), "built", plan.to_yaml(), self.savings.where)
        if "refused" in found:
            self._refused = self._refused or found["refused"]
            return Point(dict(choice), plan, {}, math.inf, 0, expected)
        return Point(dict(choice), plan, found["drift"], found["time"], found["bytes"], expected, found["parts"])

    def _plan(self, choice: Choice) -> Plan:
        return plan_of(choice, self.job.target, self.bench.workshop.last)

    def _build(self, choice: Choice, plan: Plan) -> dict[str, Any]:
        self.progress(f"plan: {text_of(choice)}")
        try:
            model = self._made(plan)
            drift, *parts = self.bench.yardstick.measure_parts(model)
        except (InputError, BrokenByPass) as error:
            return {"refused": " ".join(str(error).split())[:200]}
        self.progress("timing the plan")
        times = race_whole([self.bench.workshop.original, model], self.traffic, target=self.job.target, threads=self.job.threads)
        return {"drift": drift, "parts": parts, "time": times[1], "bytes": weight_bytes(model)}

    def _made(self, plan: Plan) -> Model:
        model, split = Model.load(self.job.model), self.bench.split
        results = run_plan(model, plan, fit=split.fit, choose=split.choose, provider=self.job.target, threads=self.job.threads,
                           progress=self.progress, fits=self.fits)
        if self.models is not None:
            self.models.put(plan, model, any(result.fired for result in results))
        return model

    def _finish(self) -> dict[str, Any]:
        points = list(self.points.values())
        built = [point for point in points if math.isfinite(point.time)]
        if not built:
            raise InputError(f"{self.job.model}: {self._refused}")
        best = self.problem.best(built, self.job)
        report = write_best(self.job, self.bench, best, self.fits, self.progress)
        front = add_front(report, best, built, self.rows)
        if self.models is not None:
            for entry, point in zip(report["front"], front, strict=True):
                entry["model"] = str(self.models.settle(point.plan, partial(self._made, point.plan)))
        kept = (self.records, self.savings.timings)
        report |= {"measured": sum(each.measured for each in kept), "reused": sum(each.reused for each in kept),
                   "seconds": round(time.monotonic() - self._began, 1)}
        if self.job.beside:
            write_beside(self.job, best, report, self.savings.where[0])
        return report


def search_file(job: SearchJob, progress: Progress = lambda message: None, *, dry_run: bool = False) -> dict[str, Any]:
    """Find the fastest model within limits, and write it.

    Returns:
        ``optimize``'s object of the best plan, and ``front``: the plans that no other beats in both drift and time, each with
        ``plan``, ``drift`` (on feeds that neither fitted nor report), ``speedup``, ``bytes``, ``predicted`` and ``chosen``;
        ``points``: all plans that were measured; ``measured`` and ``reused``: how many measurements were made and were there.
        With ``dry_run`` what would be measured, and nothing is written.

    Raises:
        InputError: bad input; nothing is written then.
    """
    search = Search(job, progress)
    return estimate(job, search.bench, search.candidates, search.measuring, search.traffic) if dry_run else search.run()


def _measured(each: Candidate) -> tuple[Candidate, ...]:
    """What is measured alone of a candidate: a pair is its two parts, whose errors add up; nothing of what is kept."""
    return () if each == KEEP else each.parts or (each,)

