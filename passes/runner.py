"""Runs a plan: each pass in turn, checked before and after."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from ..graph.errors import InputError
from ..graph.model import Model
from ..runtime import Feeds
from .base import Context, PassResult
from .fitting.kept_fits import Fits
from .fitting.resume import Resume
from .ledger import Ledger
from .plan import Plan
from .proof.gate import Gate


def run_plan(model: Model, plan: Plan, *, fit: Feeds | None = None, choose: Feeds | None = None, provider: str = "cpu",
             threads: int | None = None, progress: Callable[[str], None] = lambda message: None,
             after: Callable[[int], None] = lambda done: None, resume: Resume | None = None,
             fits: Fits | None = None) -> list[PassResult]:
    """Rewrite ``model`` in place by every pass of ``plan``.

    Args:
        fit: feeds for the passes that fit something.
        choose: feeds for those that choose blocks by a measurement; ``fit`` where there are none.
        after: told after each pass how many are done, ``model`` standing as it is then.
        resume: where moments are kept, and those of the same run before.
        fits: where fits of single blocks are kept, and those of other plans before.

    Returns:
        What each pass did, in order.

    Raises:
        InputError: a pass needs feeds and there are none, or asks for a block that is not there.
        BrokenByPass: a pass broke the model.
    """
    if plan.needs_feeds and not fit:
        raise InputError(f"the pass '{plan.needs_feeds[0]}' needs real inputs with these options: give them with --data")
    gate = Gate(model, provider)
    context = Context(fit, choose or fit, provider, threads, progress=progress, resume=resume, fits=fits)
    asked = [blocks for each in plan for blocks in each.asks_for]
    if asked:
        context.ledger = Ledger(model)
    for blocks in asked:
        context.ledger.select(blocks)  # before anything runs: an index that is not there is the user's mistake
    results: list[PassResult] = []
    for each in plan:
        progress(each.name)
        started = time.perf_counter()
        if asked and not each.exact and context.original is None:
            context.original = model.copy()
        if fits is not None:
            fits.begin(Plan(plan.passes[:len(results)]), each)
        result = each.run(model, context)
        if result.fired:
            gate.check(model, each.name)
            if asked:
                context.ledger.refresh(each.name)
        results.append(dataclasses.replace(result, seconds=time.perf_counter() - started))
        after(len(results))
    return results
