"""Exact passes at the end of a plan that pay on some machines and feeds only: those that do here are in every plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..passes.base import Pass
from ..passes.exact.padding_trial import MASK
from ..passes.plan import Plan
from ..passes.runner import run_plan
from .latency import Traffic, race_whole
from .workshop import Workshop

FINISHING = {"skip-padding": 0.99}
"""In the order in which they are tried, and run: the part of the time that must be left, at most."""


def finishing_passes(workshop: Workshop, traffic: Sequence[Traffic]) -> dict[str, list[str]]:
    """``passes``: the texts of those that make the model after the exact passes faster, one upon the other."""
    kept: list[str] = []
    model = workshop.base.copy()
    for text, worth in FINISHING.items():
        if text == "skip-padding" and not any(_has_padding(each) for each in traffic):
            continue
        workshop.progress(f"timing {text} in the whole model")
        trial = model.copy()
        if not sum(result.fired for result in run_plan(trial, Plan.parse([text]), fit=workshop.feeds, provider=workshop.target,
                                                       threads=workshop.threads, progress=workshop.progress)):
            continue
        if race_whole([model, trial], traffic, target=workshop.target, threads=workshop.threads)[1] < worth:
            kept.append(text)
            model = trial
    return {"passes": kept}


def passes_of(texts: Sequence[str]) -> tuple[Pass, ...]:
    """The passes that ``texts`` name."""
    return Plan.parse(texts).passes


def _has_padding(traffic: Traffic) -> bool:
    return any(MASK in feed and not np.all(feed[MASK]) for feed in traffic.feeds)
