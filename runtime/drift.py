"""Drift: how far the outputs of a candidate are from those of its reference, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..graph.errors import InputError
from .feeds import Feeds
from .limits import LOGITS_METRICS, LOWER, Limit
from .metrics import Metrics, OutputMetrics
from .padding import Padding
from .sessions import Session, Source, open_session
from .turns import one_at_a_time, side_by_side


@dataclass(frozen=True)
class Drift:
    """What ``compare`` measured. True where every limit was kept.

    Attributes:
        provider: ``cpu`` or ``cuda``.
        feeds: ``real`` or ``synthetic``.
        samples: how many feeds were run.
        outputs: output → metric → number; see :class:`OutputMetrics`. None where a metric does not apply, or no row was compared.
        missed: one sentence for each limit that was not kept.
        skipped: output → why it was not compared (strings, sequences).
        cuda: on CUDA, whether TF32 was allowed (``tf32``) and where the nodes of ``reference`` and ``candidate`` ran.
    """

    provider: str
    feeds: str
    samples: int
    outputs: Mapping[str, Metrics]
    missed: tuple[str, ...] = ()
    skipped: Mapping[str, str] | None = None
    cuda: Mapping[str, Any] | None = None

    def check_rows(self) -> None:
        """Check that something was compared.

        Raises:
            InputError: there are outputs that can be, and none had a row.
        """
        if self.outputs and all(metrics["nonfinite"] is None for metrics in self.outputs.values()):
            raise InputError("no row to compare: every row of the feeds is padding or empty: give feeds with tokens")

    @property
    def ok(self) -> bool:
        """Every limit was kept."""
        return not self.missed

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """``verify``'s object, on CUDA with ``cuda``. JSON has no infinity and no NaN: such numbers are null."""
        on_cuda = {} if self.cuda is None else {"cuda": self.cuda}
        return {"provider": self.provider, "feeds": self.feeds, "samples": self.samples, "ok": self.ok,
                "outputs": {name: {metric: None if value is None or not math.isfinite(value) else value
                                   for metric, value in metrics.items()} for name, metrics in self.outputs.items()},
                **on_cuda}


def compare(reference: Source | Session, candidate: Source | Session, feeds: Feeds, *, provider: str = "cpu",
            threads: int | None = None, logits: Sequence[str] = (), limits: Sequence[Limit] = (),
            outputs: Sequence[str] | None = None, use_tf32: bool = False, allow_cpu: bool = False,
            lean: bool = False, progress: Callable[[int, int], None] | None = None) -> Drift:
    """Run both models on every feed and measure how far each output moved. No output is kept.

    Args:
        reference, candidate: paths, models, or open sessions (``provider`` and ``threads`` are then theirs).
        logits: outputs that are logits, besides one called ``logits``: they get ``kl_mean``, ``top1``, ``top5``.
        limits: what must hold; those that name no output are for every floating-point output.
        outputs: values to compare instead of the outputs; they may lie inside the main graph of both models.
        use_tf32: whether CUDA may round float32 operands of MatMul to TF32.
        allow_cpu: accept nodes that compute on the CPU though CUDA was asked for.
        lean: on the CPU, keep memory down at the cost of time: one of the two models at a time, no second copy of its weights.
        progress: called after each feed with how many are done and how many there are.

    Raises:
        InputError: inputs, outputs or their shapes differ between the two; a limit or ``logits`` names what is not
            there; no feeds; ONNX Runtime fails; nodes that compute fell back to the CPU.
    """
    if not len(feeds):
        raise InputError("there are no feeds to compare on: give some with --data, or --synthetic")
    lean = lean and provider == "cpu" and not isinstance(reference, Session) and not isinstance(candidate, Session)
    open_ours, open_theirs = (partial(_opened, source, provider, threads, outputs, use_tf32, lean)
                              for source in (reference, candidate))
    ours, theirs = open_ours(), open_theirs()
    names, skipped = _compared(ours, theirs, outputs)
    chosen = _logits(names, logits)
    bounds = _bounds(limits, ours, names, chosen)
    metrics = {name: OutputMetrics(name in chosen) for name in names}
    if lean:
        ours.close()
        theirs.close()
    runs = (one_at_a_time(open_ours, open_theirs, feeds, names) if lean
            else side_by_side(ours, theirs, feeds, names))
    for done, (feed, first, second) in enumerate(runs, 1):
        padding = Padding(feed)
        if done == 1 and not allow_cpu:
            ours.check_placement()
            theirs.check_placement()
        for name in names:
            if first[name].shape != second[name].shape:
                raise InputError(f"output '{name}': the reference gives the shape {list(first[name].shape)}, the candidate "
                                 f"{list(second[name].shape)}: only models with the same outputs can be compared")
            metrics[name].update(np.asarray(first.pop(name)), np.asarray(second.pop(name)), padding)
        if progress is not None:
            progress(done, len(feeds))
    found = {name: metrics[name].result() for name in names}
    missed = tuple(_sentence(limit, name, found[name][limit.metric]) for limit, name in bounds
                   if not limit.met(found[name][limit.metric]))
    return Drift(ours.provider, feeds.kind, len(feeds), found, missed, skipped, _on_cuda(ours, theirs, use_tf32))


def _opened(source: Source | Session, provider: str, threads: int | None, outputs: Sequence[str] | None,
            use_tf32: bool, lean: bool) -> Session:
    if isinstance(source, Session):
        return source
    return open_session(source, provider=provider, threads=threads, outputs=tuple(outputs or ()), use_tf32=use_tf32, lean=lean,
                        trace=provider != "cpu")


def _on_cuda(ours: Session, theirs: Session, use_tf32: bool) -> dict[str, Any] | None:
    if ours.provider == "cpu":
        return None
    places = {"reference": ours.placement(), "candidate": theirs.placement()}
    return {"tf32": use_tf32, **{which: None if place is None else place.to_json() for which, place in places.items()}}


def _compared(ours: Session, theirs: Session, outputs: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The outputs to compare, and why others are not."""
    for what, first, second in (("input", ours.inputs, theirs.inputs), ("output", ours.outputs, theirs.outputs)):
        here, there = {spec.name for spec in first}, {spec.name for spec in second}
        if what == "input":
            here, there = ({spec.name for spec in specs if not spec.optional} for specs in (ours.inputs, theirs.inputs))
        if here != there:
            name = min(here ^ there)
            holder, other = ("reference", "candidate") if name in here else ("candidate", "reference")
            raise InputError(f"{what} '{name}' is in the {holder} and not in the {other}: "
                             f"only models with the same {what}s can be compared")
    wanted = [spec for spec in ours.outputs if outputs is None or spec.name in outputs]
    kinds = {spec.name: spec for spec in theirs.outputs}
    skipped = {spec.name: f"it is {each.onnx_type}" for spec in wanted for each in (spec, kinds[spec.name])
               if not each.is_tensor or each.dtype.kind in "Oc"}
    return [spec.name for spec in wanted if spec.name not in skipped], skipped


def _logits(names: Sequence[str], logits: Sequence[str]) -> set[str]:
    for name in logits:
        if name not in names:
            raise InputError(f"logits '{name}': the model has no such output to compare: choose from {', '.join(names)}")
    return {*logits, *({"logits"} & set(names))}


def _bounds(limits: Sequence[Limit], session: Session, names: Sequence[str],
            logits: set[str]) -> list[tuple[Limit, str]]:
    """Every limit with every output it is for."""
    floating = [spec.name for spec in session.outputs if spec.floating and spec.name in names]
    bounds = []
    for limit in limits:
        if limit.output is not None and limit.output not in names:
            raise InputError(f"limit on {limit.metric}: no output '{limit.output}': choose from {', '.join(names)}")
        over = floating if limit.output is None else [limit.output]
        if limit.metric in LOGITS_METRICS:
            over = [name for name in over if name in logits]
            if not over:
                raise InputError(f"limit on {limit.metric}: it is for outputs that are logits: name them with --logits OUTPUT")
        if not over:
            raise InputError(f"limit on {limit.metric}: no output is floating-point: name one, {limit.metric}@OUTPUT=VALUE")
        bounds += [(limit, name) for name in over]
    return bounds


def _sentence(limit: Limit, name: str, value: float | None) -> str:
    side = "at least" if limit.metric in LOWER else "at most"
    found = "is not known, as it has no row to compare" if value is None else f"is {value:.6g}"
    return f"{limit.metric} of '{name}' {found}, should be {side} {limit.value:.6g}"
