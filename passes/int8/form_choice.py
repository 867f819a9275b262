"""``target=auto``: the forms of quantization raced on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...graph.block import FFNBlock
from ...graph.errors import InputError
from ...graph.model import Model
from ...runtime import Feeds, race, synthetic_feeds
from ...runtime.feeds import Feed
from ...runtime.specs import InputSpec, input_specs
from ..base import BlockPass, Context
from .quantize_unit import Form
from .trial import attempt, positions

NEVER_SLOWER = 0.98
_SECONDS = 4.0  # of a race, for each model in it


@dataclass(frozen=True)
class Choice:
    """Which form won.

    Attributes:
        form: its name; None where every form is slower than the input on some shape.
        notes: what was measured, a sentence a form.
    """

    form: Form | None
    notes: list[str]


def fastest_form(model: Model, candidates: Mapping[Form, BlockPass], blocks: Mapping[int, FFNBlock],
                 shapes: Sequence[Sequence[int]], context: Context) -> Choice:
    """The form with the largest mean speed-up among those that are slower than the input on no shape.

    Slower is where the 95 % interval of the ratio begins below 0.98.

    Args:
        candidates: form → the pass that writes it.
        blocks: those that it would rewrite.
        shapes: sizes of the open dimensions of the inputs, in order: batch, tokens; nothing: as the feeds are.
    """
    at = positions(model, blocks.values())
    trials = {}
    for form, each in candidates.items():
        context.progress(f"{each.name}: trying {form}")
        trials[form] = attempt(model, each, at, context)
    specs = input_specs(model)
    speeds: dict[Form, list[Mapping[str, float]]] = {form: [] for form in trials}
    names = []
    for shape in shapes or [()]:
        names.append("x".join(map(str, shape)) or "the feeds")
        context.progress(f"timing the forms on {names[-1]}")
        feeds = shaped_feeds(model, specs, shape, context.choose)
        raced = race([model.copy(), *trials.values()], feeds, provider=context.provider, threads=context.threads,
                     seconds=_SECONDS * (1 + len(trials)), allow_cpu=True)
        for form, ratio in zip(trials, raced["ratios"], strict=True):
            speeds[form].append(ratio)
    notes = [f"{form}: " + ", ".join(f"{ratio['speedup']:.2f}× ({ratio['low']:.2f} to {ratio['high']:.2f}) on {name}"
                                     for name, ratio in zip(names, found, strict=True)) for form, found in speeds.items()]
    fit = {form: math.prod(ratio["speedup"] for ratio in found) for form, found in speeds.items()
           if all(ratio["low"] >= NEVER_SLOWER for ratio in found)}
    fastest = max(fit.items(), key=lambda item: item[1])[0] if fit else None
    return Choice(fastest, notes)


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """``1x1+8x128`` as shapes.

    Raises:
        ValueError: it is not written like that.
    """
    try:
        shapes = [tuple(int(size) for size in part.split("x")) for part in text.split("+")]
    except ValueError:
        shapes = [(0,)]
    if any(size < 1 for shape in shapes for size in shape):
        raise ValueError(f"shapes={text}: write it like 8x128, or 1x1+8x128")
    return shapes


def shaped_feeds(model: Model, specs: Sequence[InputSpec], shape: Sequence[int], feeds: Feeds | None) -> Feeds:
    """Feeds whose open dimensions, in order of first appearance, have the sizes in ``shape``.

    Feeds are cut or repeated along these dimensions; without any, some are made up.

    Raises:
        InputError: the inputs have fewer open dimensions.
    """
    given = feeds if feeds is not None else synthetic_feeds(specs, model=model)
    needed = [spec for spec in specs if not spec.optional]
    open_names = list(dict.fromkeys(dim for spec in needed for dim in spec.shape or () if isinstance(dim, str)))
    if len(open_names) < len(shape):
        held = ", ".join(open_names) or "none"
        raise InputError(f"shapes={'x'.join(map(str, shape))}: the inputs have {len(open_names)} open dimensions ({held}): "
                         "give a size for each")
    if not shape:
        return given
    sizes = dict(zip(open_names, shape, strict=False))
    return Feeds.of([_resized(feed, specs, sizes) for feed in given[:2]], synthetic=given.synthetic)


def _resized(feed: Feed, specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> Feed:
    found = dict(feed)
    for spec in specs:
        array = feed.get(spec.name)
        if not isinstance(array, np.ndarray) or spec.shape is None:
            continue
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim in sizes:
                array = np.take(array, np.arange(sizes[dim]) % array.shape[axis], axis=axis)
        found[spec.name] = np.ascontiguousarray(array)
    return found
