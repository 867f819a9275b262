"""All weights down the gradient together, and the best of them by the feeds that choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.model import Model
from ...runtime import Feed
from ..base import Context
from ..fitting.adam import falling
from .batches import Batches, rows_in
from .steps import Steps
from .student import Student

Array = npt.NDArray[Any]
Weights = dict[str, Array]
_RISE = 50  # steps until the rate is reached
_SPARSE = 0.05  # of a matrix: so many zeros were put there, and stay


@dataclass
class Descent:
    """What came of it.

    Attributes:
        weights: the best.
        before, after: the loss on the feeds that choose, of the weights it began with and of the best.
        epochs: after how many the best were there.
    """

    weights: Weights
    before: float
    after: float
    epochs: int = 0


def descend(student: Student, start: Weights, model: Model, context: Context, *, epochs: int, rate: float, vary: bool,
            progress: Callable[[str], None]) -> Descent:
    """Go ``epochs`` times through the feeds to fit to.

    Args:
        start: float32, by name; stays as it is.
        model: the student's, of which its inputs are read.
        rate: the size of a step at its largest, as a part of the root mean square of its matrix.
        vary: make other texts and pictures of those of the feeds.

    Returns:
        The weights after the epoch, or before the first, that lost least on those of the feeds that choose where a loss can be
        stated. Zeros stay zero in matrices that have many.
    """
    assert context.fit is not None
    assert context.choose is not None
    start = {name: start[name] for name in student.weights}
    steps = Steps(start, {name: array != 0 for name, array in start.items()
                          if array.ndim > 1 and np.mean(array == 0) > _SPARSE}, context)
    student.move_to(steps.weights)
    judging = [feed for feed in context.choose if np.isfinite(student.loss(feed))]
    before = loss_on(student, judging, steps.weights)
    batches = Batches(model, context.fit, student, context.provider, vary=vary)
    sizes, most = _sizes(start), epochs * len(batches)
    found, done, last = Descent(dict(start), before, before), 0, before
    held = None if context.resume is None else context.resume.load_arrays()
    if held is not None and float(held["before"]) == before:
        done, last = int(held["done"]), float(held["last"])
        found = Descent({name: held[f"best.{name}"] for name in start}, before, float(held["after"]), int(held["epochs"]))
        steps.restore({(kind, name): held[f"{kind}.{name}"] for kind, name in steps.state()}, int(held["steps"]))
    for epoch in range(done, epochs):
        random = np.random.default_rng(epoch)
        for number, feeds in enumerate(batches.of_epoch(random)):
            progress(f"epoch {epoch + 1} of {epochs}, step {number + 1} of {len(batches)}, loss {last:.4g}, best "
                     f"{found.after:.4g}, at first {before:.4g}")
            student.move_to(steps.weights)
            rows = [rows_in(feed) for feed in feeds]
            for feed, count in zip(feeds, rows, strict=True):
                student.add(feed, count / sum(rows))
            size = rate * falling(epoch * len(batches) + number, most, min(_RISE, max(1, most // 10)))
            steps.step(student.gradient(), {name: size * sizes[name] for name in start})
        last = loss_on(student, judging, steps.weights)
        if last < found.after or context.resume is not None:
            state = steps.state()
            if last < found.after:
                found = Descent({name: state["weight", name] for name in start}, before, last, epoch + 1)
            if context.resume is not None:
                context.resume.save_arrays(_record(found, state, {"done": epoch + 1, "last": last, "steps": steps.taken}))
    return found


def loss_on(student: Student, feeds: Sequence[Feed], weights: Mapping[str, Any]) -> float:
    """The mean loss over ``feeds``; infinite where one of them gives no number, or there is none."""
    student.move_to(weights)
    return float(np.mean([student.loss(feed) for feed in feeds])) if feeds else np.inf


def _record(found: Descent, state: Mapping[tuple[str, str], Array], numbers: Mapping[str, float]) -> Weights:
    """What is needed to go on from here."""
    numbers = {**numbers, "before": found.before, "after": found.after, "epochs": found.epochs}
    return {**{name: np.asarray(value) for name, value in numbers.items()},
            **{f"{kind}.{name}": array for (kind, name), array in state.items()},
            **{f"best.{name}": array for name, array in found.weights.items()}}


def _sizes(weights: Weights) -> dict[str, float]:
    """The root mean square of each matrix; for vectors, which may be zero, at least the median of those."""
    sizes = {name: float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) for name, array in weights.items()}
    matrices = [sizes[name] for name, array in weights.items() if array.ndim > 1]
    usual = float(np.median(matrices)) if matrices else 0.0
    return {name: size if weights[name].ndim > 1 else max(size, usual) for name, size in sizes.items()}
