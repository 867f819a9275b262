"""What a search is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.limits import LOGITS_METRICS, Limit


@dataclass(frozen=True)
class SearchJob:
    """What ``search`` is asked to do.

    Attributes:
        model, output: files; plan.yaml and front.json are written beside the output.
        data: feeds; a folder with fit/, choose/ and report/ is taken as it is divided.
        limits: on the drift; ``perplexity`` and ``score`` are metrics here too.
        logits: outputs that are logits, besides one called ``logits`` and those that a limit calls so.
        min_speedup, max_bytes: what else the model has to be.
        target: ``cpu`` or ``cuda``: where it is to be fast.
        shapes: ``NAME=8x128`` with ``*WEIGHT``; nothing: as the feeds are.
        minutes: when to stop measuring.
        perplexity: the output that holds logits of the next token, or None.
        score: ``module:function`` of the user's own metric, or None.
        scheduler: address of a Dask scheduler, or None.
        workers: processes that measure drift here.
        cache: where measurements are kept; None: in the user's cache folder.
        seed: another one measures anew.
        strict, detailed, external: as in :class:`~ffnfold.passes.optimize.Job`, of the model that is written.
        beside: write plan.yaml and front.json beside it.
        front: a folder for the model of each plan on the front, or None.
    """

    model: Path
    output: Path
    data: Path
    limits: Sequence[Limit] = field(default_factory=tuple)
    min_speedup: float | None = None
    max_bytes: int | None = None
    target: str = "cpu"
    threads: int | None = None
    shapes: Sequence[str] = ()
    minutes: float = 30.0
    perplexity: str | None = None
    score: str | None = None
    scheduler: str | None = None
    workers: int = 1
    cache: Path | None = None
    seed: int = 0
    strict: bool = False
    detailed: bool = False
    external: bool | None = None
    beside: bool = True
    logits: Sequence[str] = ()
    front: Path | None = None

    @property
    def all_logits(self) -> tuple[str, ...]:
        """The outputs that are logits: a limit on a metric of logits says that its output is."""
        named = {each.output for each in self.limits if each.output is not None and each.metric in LOGITS_METRICS}
        return tuple(sorted({*self.logits, *named}))
