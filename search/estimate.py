"""What a search would measure, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from .alone import Alone
from .candidates import HEAD, OTHERS, Candidate
from .job import SearchJob
from .latency import Traffic, block_key
from .scoring import Bench

_OUTSIDE = {OTHERS: "attention", HEAD: "head"}
_LATENCY, _WHOLE = 20.0, 40.0  # seconds: of a shape of block at a shape of input, and of the whole models
_OTHER = 5.0  # seconds, of a form of what is raced in the whole model, at a shape of input


def estimate(job: SearchJob, bench: Bench, candidates: Mapping[int, Sequence[Candidate]],
             measuring: Alone, traffic: Sequence[Traffic]) -> dict[str, Any]:
    """The candidates, how many of them are to be measured, and about how many minutes that takes: one of them is measured."""
    shop = bench.workshop
    shapes = {block_key(shop, unit): unit for unit in shop.blocks}
    drift = [*measuring.unknown_together(),
             *(each for several in measuring.unknown().values() for each in several if each.parts is None)]
    started = time.perf_counter()
    bench.yardstick.measure(shop.base.copy())
    one = time.perf_counter() - started
    forward = one / (2 * max(1, len(bench.split.choose)))
    fit = 4 * forward * len(bench.split.fit)  # the model twice, and as long for the moments
    passes = {measuring.short and each.neurons == 0 for each in drift if each.fitted}  # inputs alone, neurons
    alone = len(drift) * 1.5 * one + fit * len(passes)
    others = sum(len(several) - 1 for unit, several in candidates.items() if unit in _OUTSIDE)
    latency = (len(shapes) * _LATENCY + others * _OTHER) * len(traffic) + _WHOLE
    return {"model": str(job.model), "dry_run": True, "ffn_blocks": len(shop.blocks), "block_shapes": len(shapes),
            "candidates": {_OUTSIDE.get(unit, str(unit)): [str(each) for each in several]
                           for unit, several in candidates.items()},
            "measurements": {"drift": len(drift), "latency": sum(len(candidates[unit]) for unit in shapes.values()) + others},
            "minutes": {"alone": round((alone + latency) / 60, 2), "each_plan": round((fit + one + latency / 4) / 60, 2),
                        "budget": job.minutes}}
