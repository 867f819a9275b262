"""What each form of each unit saves of the time of the model: measured, or read from the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .candidates import HEAD, KEEP, OTHERS, Candidate, name_of
from .choice import text_of
from .finishing import finishing_passes, passes_of
from .latency import Traffic, block_key, block_times, milliseconds_of_base, saved_in_whole
from .records import Records
from .workshop import Workshop

_LITTLE = 0.02  # of the time of the original, below which what blocks save is not scaled
_SCALES = 0.5, 2.5  # by no less and no more, whatever was measured


class Savings:
    """Measures latency, and says how much of the original's time a form of a unit saves.

    Args:
        records: of this model and these feeds; timings: of blocks of a shape, in whatever model.
        where: the machine, and all else that a time depends on.

    Attributes:
        where: with the passes that end every plan, once ``measure`` has found them.
        base: the time after the exact passes, as a part of the original's.
        saved: (unit, form) → part of the original's time.
    """

    def __init__(self, workshop: Workshop, traffic: Sequence[Traffic], records: Records, timings: Records, where: tuple[Any, ...],
                 progress: Callable[[str], None]) -> None:
        self.timings, self.where = timings, where
        self.base = 1.0
        self.saved: dict[tuple[int, Candidate], float] = {}
        self._workshop, self._traffic, self._records, self._progress = workshop, traffic, records, progress
        self._base_ms = 1.0, 1.0

    def measure(self, candidates: Mapping[int, Sequence[Candidate]], until: float) -> None:
        """Time every unit in each of its forms.

        Args:
            until: by ``time.monotonic()``; afterwards one form is timed in the whole model of each unit that is timed there.
        """
        shop = self._workshop
        shop.last = passes_of(self._records.measure(partial(finishing_passes, shop, self._traffic), "finishing", self.where))
        self.where = (*self.where, *(each.name for each in shop.last))
        self._base_ms = self._records.measure(partial(self._telling, "timing the model", milliseconds_of_base, shop,
                                                      self._traffic), "base", self.where)
        self.base = self._base_ms[1] / self._base_ms[0]
        cut: list[int] = []
        for unit, several in candidates.items():
            if unit in (OTHERS, HEAD):
                self._time_whole(unit, several[1:], until, name_of(unit))
            else:
                cut += [unit] * self._time_block(unit, several, until)
            self.saved[unit, KEEP] = 0.0
        self._scale({unit: candidates[unit] for unit in cut})

    def _time_whole(self, unit: int, several: Sequence[Candidate], until: float, *what: object) -> None:
        for number, each in enumerate(several):
            if number and time.monotonic() > until:
                break
            message = f"timing {name_of(unit)} in the whole model: {each}"
            part = self._in_whole(message, {unit: each}, *what, str(each))
            if part is not None:
                self.saved[unit, each] = part

    def _in_whole(self, message: str, changes: Mapping[int, Candidate], *what: object) -> float | None:
        part = self._records.measure(partial(self._telling, message, saved_in_whole, self._workshop, changes, self._traffic),
                                     *what, self.where)
        return None if part["saved"] is None else part["saved"] * self.base

    def _time_block(self, unit: int, several: Sequence[Candidate], until: float) -> bool:
        """Time a block cut out, else in the whole model; whether it could be cut out."""
        shop = self._workshop
        measuring = partial(self._telling, f"timing block {unit}", block_times, shop, unit, several, self._traffic)
        times = self.timings.measure(measuring, "block", block_key(shop, unit), [str(each) for each in several], self.where)
        kept = times.get(str(KEEP))
        if kept is None:
            self._time_whole(unit, [each for each in several[1:] if each.neurons is None], until, "whole", block_key(shop, unit))
            return False
        for each in several:
            if times.get(str(each)) is not None:
                self.saved[unit, each] = (kept - times[str(each)]) / self._base_ms[0]
        return True

    def _scale(self, cut: Mapping[int, Sequence[Candidate]]) -> None:
        """Bring what blocks save, cut out, to what they save in the whole model: all of them at once, each in its fastest form
        that needs no fit."""
        fastest = {}
        for unit, several in cut.items():
            saved = {each: self.saved.get((unit, each), 0.0) for each in several if each.form and not each.fitted}
            if max(saved.values(), default=0.0) > 0:
                fastest[unit] = max(saved, key=lambda each: saved[each])
        apart = sum(self.saved[item] for item in fastest.items())
        if apart < _LITTLE:
            return
        together = self._in_whole("timing all blocks in the whole model", fastest, "scale", text_of(fastest))
        if together is None:
            return
        scale = min(max(together / apart, _SCALES[0]), _SCALES[1])
        self.saved |= {(unit, each): scale * self.saved[unit, each] for unit, several in cut.items() for each in several
                       if (unit, each) in self.saved}

    def _telling(self, message: str, how: Callable[..., Any], *arguments: Any) -> Any:
        self._progress(message)
        return how(*arguments)
