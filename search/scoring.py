"""The drift of each form of each unit, measured alone: replace one, keep the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..graph.errors import BrokenByPass, InputError
from ..graph.model import Model
from ..passes.fitting.evidence import Evidence, OutOfTimeError
from ..passes.fitting.neuron_fit import NeuronFit
from ..passes.split import Split, load_split
from ..runtime.specs import input_specs
from .candidates import Candidate
from .delivery import unpacked
from .workshop import Workshop
from .yardstick import Yardstick, load_score

Scored = dict[str, Any]
"""``drift`` and ``bytes`` more than the base, or ``refused`` and why; ``seconds`` that it took, ``moments`` of them for those."""


@dataclass(frozen=True)
class Setting:
    """All that the drift of a candidate depends on, small enough to be sent to a worker.

    Attributes:
        model, data: files, as the client sees them.
        archive: of copies of them, for workers that see no such files.
        short: an affine map alone is fitted to moments without those of neurons, which take longer; they differ by rounding.
    """

    model: Path
    data: Path
    target: str
    threads: int | None
    perplexity: str | None = None
    score: str | None = None
    logits: tuple[str, ...] = ()
    archive: str = ""
    short: bool = False


class Bench:
    """A workshop and a yardstick over one model, and the moments of the block in work.

    Raises:
        InputError: the model or the feeds cannot be read.
    """

    def __init__(self, setting: Setting, progress: Callable[[str], None] = lambda message: None) -> None:
        self.setting = setting
        model, data = _here(setting)
        original = Model.load(model)
        self.split: Split = load_split(data, input_specs(original), True)
        self.workshop = Workshop(model, self.split.fit, setting.target, setting.threads, progress)
        self.yardstick = Yardstick(original, self.split.choose, provider=setting.target, threads=setting.threads,
                                   logits=setting.logits, perplexity=setting.perplexity,
                                   score=load_score(setting.score) if setting.score else None)
        self._bytes = weight_bytes(self.workshop.base)
        self._unit: int | None = None
        self._evidence: Evidence | None = None
        self._neurons = True
        self._until = math.inf
        self._coming: Any = None
        self._waited = 0.0

    def score(self, unit: int, each: Candidate, until: float = math.inf) -> Scored:
        """Measure one candidate.

        Args:
            until: by ``time.monotonic()``; moments that take longer are given up.

        Raises:
            OutOfTimeError: they were.
        """
        started, self._waited, self._until = time.perf_counter(), 0.0, until
        found = self._scored(unit, each)
        return {**found, "seconds": round(time.perf_counter() - started, 3), "moments": round(self._waited, 3)}

    def score_together(self, changes: Mapping[int, Candidate]) -> Scored:
        """Measure forms of several units at once, none of them fitted."""
        started = time.perf_counter()
        found = self._measured(changes, {})
        return {**found, "seconds": round(time.perf_counter() - started, 3)}

    def _scored(self, unit: int, each: Candidate) -> Scored:
        fits: dict[int, NeuronFit] = {}
        try:
            if each.neurons is not None:
                evidence = self._moments(unit, neurons=each.neurons > 0 or not self.setting.short)
                if not evidence.rows:
                    return {"refused": evidence.finite.why_none("").reason}
                fits[unit] = self.workshop.fit(unit, each, evidence)
        except (InputError, BrokenByPass, ValueError) as error:
            return _refused(error)
        return self._measured({unit: each}, fits)

    def _measured(self, changes: Mapping[int, Candidate], fits: Mapping[int, NeuronFit]) -> Scored:
        try:
            trial = self.workshop.rewritten(changes, fits)
            if trial is None:
                return {"refused": "the pass refuses it"}
            return {"drift": self.yardstick.measure(trial), "bytes": weight_bytes(trial) - self._bytes}
        except (InputError, BrokenByPass, ValueError) as error:
            return _refused(error)

    def _moments(self, unit: int, neurons: bool) -> Evidence:
        if self._unit == unit and self._evidence is not None and self._neurons == neurons:
            return self._evidence
        started = time.perf_counter()
        self._evidence = None  # let go of it before the next is made
        order = list(self.workshop.blocks)
        gone_by = self._unit is None or order.index(unit) <= order.index(self._unit)
        if self._coming is None or gone_by or self._neurons != neurons:
            self._coming, self._neurons = self.workshop.evidence(order[order.index(unit):], neurons=neurons,
                                                                     late=self._late), neurons
        try:
            for index, evidence in self._coming:
                if index == unit:
                    self._unit, self._evidence, self._waited = unit, evidence, time.perf_counter() - started
                    return evidence
        except BaseException:
            self._coming = None  # it is at its end
            raise
        raise InputError(f"there is no block {unit}")

    def _late(self) -> bool:
        return time.monotonic() > self._until


def _refused(error: Exception) -> Scored:
    return {"refused": " ".join(str(error).split())[:200]}


def weight_bytes(model: Model) -> int:
    """Bytes of all weights of ``model`` as it stands."""
    proto, weights = model.session_parts()
    return len(proto) + sum(each.nbytes for each in weights.values())


@lru_cache(maxsize=1)
def bench_of(setting: Setting) -> Bench:
    """The bench of this process."""
    return Bench(setting)


def score_several(setting: Setting, unit: int, several: Sequence[Candidate],
                  left: float = math.inf) -> list[tuple[Candidate, Scored]]:
    """What a worker does at once: candidates of one unit, which share their moments.

    Args:
        left: seconds, after which none begins and moments are given up; what was measured by then is returned.
    """
    until = time.monotonic() + left
    bench = bench_of(setting)
    found = []
    for each in several:
        if time.monotonic() > until:
            break
        try:
            found.append((each, bench.score(unit, each, until)))
        except OutOfTimeError:
            break
    return found


def _here(setting: Setting) -> tuple[Path, Path]:
    if setting.archive and not setting.model.exists():
        return unpacked(setting.archive, setting.model.name)
    return setting.model, setting.data
