"""Which feeds fit, which choose and which report: disjoint, so that nothing is reported on what it was fitted to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..graph.errors import InputError
from ..runtime import Feeds, load_feeds
from ..runtime.specs import InputSpec

_PARTS = ("fit", "choose", "report")


@dataclass(frozen=True)
class Split:
    """Feeds for each purpose.

    Attributes:
        fit, choose, report: disjoint, unless ``disjoint`` is False (there was one feed only).
    """

    fit: Feeds
    choose: Feeds
    report: Feeds
    disjoint: bool = True


def load_split(path: Path, inputs: Sequence[InputSpec], fits: bool) -> Split:
    """The feeds at ``path``, divided.

    A folder with the folders ``fit``, ``choose`` and ``report`` (the first or last two may be missing) is taken as it is
    divided. Else, where something is fitted (``fits``), every sixth feed reports, the next one chooses, and the others fit.

    Raises:
        InputError: no feeds there, or they do not fit the inputs.
    """
    parts = {name: load_feeds(path / name, inputs) for name in _PARTS if os.path.isdir(path / name)}
    if parts:
        if "report" not in parts:
            raise InputError(f"{path}: has no folder 'report': divide the feeds into fit, choose and report")
        fit = parts.get("fit", parts.get("choose", parts["report"]))
        return Split(fit, parts.get("choose", fit), parts["report"], "fit" in parts or not fits)
    return divide(load_feeds(path, inputs), fits)


def divide(feeds: Feeds, fits: bool) -> Split:
    """Divide one sequence: feeds 0, 6, 12, … report, 1, 7, 13, … choose, the others fit."""
    if not fits or len(feeds) < 2:
        return Split(feeds, feeds, feeds, disjoint=not fits)
    if len(feeds) == 2:
        return Split(feeds[1:], feeds[1:], feeds[:1])
    numbers = range(len(feeds))
    report, choose = [n for n in numbers if n % 6 == 0], [n for n in numbers if n % 6 == 1]
    fit = [n for n in numbers if n % 6 > 1]
    return Split(_pick(feeds, fit or choose), _pick(feeds, choose), _pick(feeds, report))


def _pick(feeds: Feeds, numbers: Sequence[int]) -> Feeds:
    return Feeds([partial(feeds.__getitem__, number) for number in numbers], synthetic=feeds.synthetic)
