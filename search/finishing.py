"""Skipping padding pays on some machines and feeds only: where it does here, every plan ends with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..passes.base import Pass
from ..passes.exact.padding_trial import MASK
from ..passes.plan import Plan
from ..passes.runner import run_plan
from ..passes.skip_padding import SkipPadding
from .latency import Traffic, race_whole
from .workshop import Workshop

_WORTH = 0.99  # part of the time that is left, at most
_PASS = SkipPadding()


def finishing_passes(workshop: Workshop, traffic: Sequence[Traffic]) -> dict[str, bool]:
    """``skip-padding``: whether it makes the model after the exact passes faster."""
    if not any(_has_padding(each) for each in traffic):
        return {_PASS.name: False}
    workshop.progress("timing skip-padding in the whole model")
    trial = workshop.base.copy()
    [result] = run_plan(trial, Plan((_PASS,)), fit=workshop.feeds, provider=workshop.target, threads=workshop.threads,
                        progress=workshop.progress)
    if not result.fired:
        return {_PASS.name: False}
    times = race_whole([workshop.base.copy(), trial], traffic, target=workshop.target, threads=workshop.threads)
    return {_PASS.name: times[1] < _WORTH}


def passes_of(found: Mapping[str, bool]) -> tuple[Pass, ...]:
    """The passes that ``finishing_passes`` found."""
    return (_PASS,) if found[_PASS.name] else ()


def _has_padding(traffic: Traffic) -> bool:
    return any(MASK in feed and not np.all(feed[MASK]) for feed in traffic.feeds)
