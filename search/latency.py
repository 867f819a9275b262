"""How long a unit takes on this machine, in each of its forms.

A block is cut out of the model, from the values that it reads of the residual stream to what its residual Add gives, in each form
that it may take, with weights of the right shape that were not fitted; the cuts are raced against each other on the values that
real feeds bring there. What was measured holds for every block of the same shape. A block that is run again and again has its
weights in the cache, and in the whole model it has not: what blocks save is scaled by one race of the whole model. The linears
outside the blocks are not in one place, and a block inside an If or a Loop cannot be cut out: they are raced in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from ..graph.check import prune
from ..graph.model import Model
from ..passes.proof.spans import find_spans
from ..passes.skip_padding import SkipPadding
from ..runtime import Feeds, Variant, open_session, race
from ..runtime.padding import Padding
from .candidates import KEEP, Candidate
from .workshop import Workshop

_SECONDS = 0.4  # of a race of cut blocks, for each
_SECONDS_WHOLE = 1.5  # of a race of whole models, for each
_ROUNDS, _MOST_ROUNDS = 5, 200  # of a race


@dataclass(frozen=True)
class Traffic:
    """Feeds of one shape, and how often it comes.

    Attributes:
        name: the shape, for people and for the cache.
    """

    name: str
    feeds: Feeds
    weight: float = 1.0


def race_whole(models: Sequence[Model], traffic: Sequence[Traffic], *, target: str, threads: int | None) -> list[float]:
    """Time of each model over that of the first, over all shapes: Σ weight · t / Σ weight · t_first. The first is 1."""
    totals = _milliseconds(models, traffic, target, threads)
    return [total / totals[0] for total in totals]


def milliseconds_of_base(workshop: Workshop, traffic: Sequence[Traffic]) -> tuple[float, float]:
    """Time of the original and of the model after the exact passes, in ms, over all shapes: Σ weight · t."""
    models = [workshop.original, *([workshop.finished_base()] if workshop.fired or workshop.last else [])]
    totals = _milliseconds(models, traffic, workshop.target, workshop.threads)
    return totals[0], totals[-1]


def _milliseconds(models: Sequence[Model], traffic: Sequence[Traffic], target: str, threads: int | None) -> list[float]:
    totals = [0.0] * len(models)
    for each in traffic:
        found = race([Variant(model, str(number)) for number, model in enumerate(models)], each.feeds, provider=target,
                     threads=threads, seconds=_SECONDS_WHOLE * len(models), min_rounds=_ROUNDS, max_rounds=_MOST_ROUNDS,
                     allow_cpu=True)
        first = found["models"][0]["p50_ms"] * each.weight
        totals[0] += first
        for number, ratio in enumerate(found["ratios"], 1):
            totals[number] += first / ratio["speedup"]
    return totals


def saved_in_whole(workshop: Workshop, changes: Mapping[int, Candidate], traffic: Sequence[Traffic]) -> dict[str, float | None]:
    """``saved``: what forms of units save of the base's time together, as a part of it; None where it cannot be done."""
    trial = workshop.rewritten(changes, {}, timed=True)
    if trial is None:
        return {"saved": None}
    models = [workshop.finished_base(), workshop.finished(trial)]
    times = race_whole(models, traffic, target=workshop.target, threads=workshop.threads)
    return {"saved": 1.0 - times[1]}


def block_key(workshop: Workshop, unit: int) -> str:
    """What the latency of a block depends on."""
    block = workshop.blocks[unit]
    return (f"{block.d_model} {block.d_ff} {block.d_out} {block.activation.name} gated={block.gate is not None} "
            f"bias={block.up.has_bias},{block.down.has_bias} type={block.onnx_type} direct={block.join.direct} "
            f"norm={block.join.residual is block.input} {block.join.node.op} {'quantized' if block.quantized else ''}"
            f"{'' if block.path == 'main' else 'inside'}")


def block_times(workshop: Workshop, unit: int, candidates: Sequence[Candidate],
                traffic: Sequence[Traffic]) -> dict[str, float | None]:
    """Milliseconds of a block in each form, by its text, over all shapes; None where it cannot be cut out or written so."""
    made: dict[Candidate, Model] = {}
    inputs: dict[str, int] = {}
    found: dict[str, float | None] = dict.fromkeys(map(str, candidates))
    position = _position(workshop, unit)
    for each in dict.fromkeys([KEEP, *(one for one in candidates if not one.removed)]):
        fits = {} if each.neurons is None else {unit: workshop.stand_in(unit, each)}
        whole = workshop.base.copy() if each == KEEP else workshop.rewritten({unit: each}, fits, timed=True)
        if whole is None:
            continue
        span = next((span for span in find_spans(workshop.base.copy(), whole).spans if span.index == position), None)
        if span is None:
            continue
        if each == KEEP:
            inputs = _kinds(workshop.base, span.given, workshop)
        made[each] = cut(whole, span.exits, inputs)
    if KEEP not in made:
        return found
    totals = dict.fromkeys(made, 0.0)
    for shape in traffic:
        feeds = _captured(workshop, list(inputs), shape.feeds)
        used = {name for model in made.values() for name in (info.name for info in model.graph.inputs)}
        given = [{name: value for name, value in feed.items() if name in used} for feed in feeds]
        for each, milliseconds in _race_cuts(workshop, made, given).items():
            totals[each] += milliseconds * shape.weight
    return {**found, **{str(each): total for each, total in totals.items()},
            **{str(each): 0.0 for each in candidates if each.removed}}


def cut(model: Model, exits: Sequence[str], inputs: Mapping[str, int]) -> Model:
    """What lies between the values ``inputs`` and ``exits``, as a model."""
    proto, values = model.to_proto()
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    prune(part.graph, set(exits), inputs)
    del part.graph.value_info[:]
    return Model(part, values, model.path, model.external)


def _race_cuts(workshop: Workshop, made: Mapping[Candidate, Model], feeds: Sequence[dict[str, object]]) -> dict[Candidate, float]:
    times = {}
    kept = made[KEEP]
    for each, model in made.items():
        if each == KEEP:
            continue
        names = [{info.name for info in one.graph.inputs} for one in (kept, model)]
        if names[0] != names[1]:
            continue
        both = Feeds.of([{name: value for name, value in feed.items() if name in names[0]} for feed in feeds])
        found = race([Variant(kept, "keep"), Variant(model, str(each))], both, provider=workshop.target, threads=workshop.threads,
                     seconds=2 * _SECONDS, min_rounds=_ROUNDS, max_rounds=_MOST_ROUNDS, allow_cpu=True)
        times[each] = (found["models"][0]["p50_ms"], found["ratios"][0]["speedup"])
    first = min((time for time, _ in times.values()), default=0.0)
    return {KEEP: first, **{each: first / ratio for each, (_, ratio) in times.items()}}


def _position(workshop: Workshop, unit: int) -> int:
    """Where a block stands among those of the base as it is now."""
    found = workshop.find(workshop.base.copy(), unit)
    return -1 if found is None else found.index


def _kinds(model: Model, names: Sequence[str], workshop: Workshop) -> dict[str, int]:
    session = open_session(model, provider=workshop.target, threads=workshop.threads, outputs=list(names), lean=True)
    kinds = {spec.name: spec.element_type for spec in session.outputs}
    return {name: kinds[name] for name in names}


def _captured(workshop: Workshop, names: Sequence[str], feeds: Feeds) -> list[dict[str, object]]:
    if not names:  # the block reads the inputs of the model
        return [dict(feed) for feed in feeds[:2]]
    session = open_session(workshop.base, provider=workshop.target, threads=workshop.threads, outputs=list(names), only=True,
                           lean=True)
    taken = {spec.name for spec in session.inputs}
    packs = any(isinstance(each, SkipPadding) for each in workshop.last)
    found = []
    for feed in feeds[:2]:
        values = session.run({key: value for key, value in feed.items() if key in taken}, names)
        found.append({**feed, **(_packed(values, Padding(feed)) if packs else values)})
    return found


def _packed(values: Mapping[str, Any], padding: Padding) -> dict[str, Any]:
    """Values ``[batch, tokens, d]`` without their rows of padding, as ``[1, rows, d]``."""
    kept = {name: padding.kept(value.shape) if value.ndim == 3 else None for name, value in values.items()}
    return {name: value if kept[name] is None else value.reshape(-1, value.shape[-1])[kept[name]][None]
            for name, value in values.items()}

