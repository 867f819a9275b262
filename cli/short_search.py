"""What ``optimize`` does where it is told how much drift is bearable and not how: a short search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..passes.optimize import Job, check_places
from ..passes.plan import Plan

MINUTES = 2.0
_OWN = ("front", "points", "measured", "reused", "seconds", "speedup")


def short_search(job: Job, target: str, progress: Callable[[str], None]) -> tuple[dict[str, Any], Plan]:
    """``optimize``'s object of the best plan within the limits of ``job``, and that plan."""
    from ..search import SearchJob, search_file

    assert job.data is not None
    check_places(job)
    report = search_file(SearchJob(job.model, job.output, job.data, limits=job.limits, logits=job.logits, target=target,
                                   threads=job.threads, minutes=MINUTES, cache=job.cache, strict=job.strict,
                                   detailed=job.detailed, beside=False), progress)
    report["notes"].insert(0, f"no plan was given: a search of {MINUTES:g} minutes measured {len(report['points'])} plans and "
                              "took the fastest within the limits (ffnfold search takes longer, and finds better ones)")
    return {key: value for key, value in report.items() if key not in _OWN}, Plan.from_entries(report["plan"])
