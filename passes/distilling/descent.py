"""All weights down the gradient together, and the best of them by the feeds that choose."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...runtime import Feed, Feeds
from ..base import Context
from ..fitting.adam import adam_step, falling
from .joined_texts import JoinedTexts
from .student import Student

Array = npt.NDArray[Any]
Weights = dict[str, Array]
_RISE = 50  # steps until the rate is reached
_MOST_THREADS = 8
_SPARSE = 0.05  # of a matrix: so many zeros were put there, and stay
_ROWS = 4  # sentences or images that a step sees at least


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


def descend(student: Student, start: Weights, texts: JoinedTexts | None, context: Context, *, epochs: int, rate: float,
            progress: Callable[[str], None]) -> Descent:
    """Go ``epochs`` times through the feeds to fit to.

    Args:
        start: float32, by name; stays as it is.
        texts: makes other texts of those of the feeds; None: the feeds as they are.
        rate: the size of a step at its largest, as a part of the root mean square of its matrix.

    Returns:
        The weights after the epoch, or before the first, that lost least on those of the feeds that choose where a loss can be
        stated. Zeros stay zero in matrices that have many.
    """
    assert context.fit is not None
    assert context.choose is not None
    feeds, now = context.fit, {name: start[name].copy() for name in student.weights}
    first, second = ({name: np.zeros_like(array) for name, array in now.items()} for _ in range(2))
    sizes = _sizes(now)
    together = max(1, -(-_ROWS // _rows(feeds)))
    steps = epochs * -(-len(feeds) // together)
    student.move_to(now)
    judging = [feed for feed in context.choose if np.isfinite(student.loss(feed))]
    before = loss_on(student, judging, now)
    zeros = {name: array == 0 for name, array in now.items() if array.ndim > 1 and np.mean(array == 0) > _SPARSE}
    found = Descent(dict(start), before, before)
    done, step = 0, 0
    held = None if context.resume is None else context.resume.load_arrays()
    if held is not None and float(held["before"]) == before:
        done, step = int(held["done"]), int(held["step"])
        found = Descent({name: held[f"best.{name}"] for name in now}, before, float(held["after"]), int(held["epochs"]))
        for target, kind in ((now, "now"), (first, "first"), (second, "second")):
            target.update({name: held[f"{kind}.{name}"] for name in now})
    for epoch in range(done, epochs):
        random = np.random.default_rng(epoch)
        order = random.permutation(len(feeds))
        for begin in range(0, len(order), together):
            progress(f"epoch {epoch + 1} of {epochs}, feed {begin + 1} of {len(feeds)}, loss {found.after:.4g}, "
                     f"at first {before:.4g}")
            gradient = _gradient(student, feeds, order[begin:begin + together].tolist(), texts, random, now)
            for name in zeros.keys() & gradient.keys():
                gradient[name][zeros[name]] = 0
            size = rate * falling(step, steps, min(_RISE, max(1, steps // 10)))
            step += 1
            _step(gradient, now, first, second, {name: size * sizes[name] for name in gradient}, step)
        lost = loss_on(student, judging, now)
        if lost < found.after:
            found = Descent({name: array.copy() for name, array in now.items()}, before, lost, epoch + 1)
        if context.resume is not None:
            context.resume.save_arrays({
                "before": np.asarray(before),
                "done": np.asarray(epoch + 1), "step": np.asarray(step), "after": np.asarray(found.after),
                "epochs": np.asarray(found.epochs),
                **{f"{kind}.{name}": array for kind, arrays in (("now", now), ("first", first), ("second", second),
                                                                ("best", found.weights)) for name, array in arrays.items()}})
    return found


def loss_on(student: Student, feeds: Sequence[Feed], weights: Weights) -> float:
    """The mean loss over ``feeds``; infinite where one of them gives no number, or there is none."""
    student.move_to(weights)
    return float(np.mean([student.loss(feed) for feed in feeds])) if feeds else np.inf


def _gradient(student: Student, feeds: Feeds, chosen: Sequence[int], texts: JoinedTexts | None, random: np.random.Generator,
              weights: Weights) -> Weights:
    """The mean over the feeds ``chosen``; nothing where one of them gives no number."""
    student.move_to(weights)
    for number in chosen:
        feed = feeds[int(number)]
        student.add(feed if texts is None else texts.of(feed, random))
    return {name: each / np.float32(len(chosen)) for name, each in student.gradient().items()}


def _step(gradient: Weights, now: Weights, first: Weights, second: Weights, rates: dict[str, float], step: int) -> None:
    """One step of all weights; NumPy computes without the lock of the interpreter, so they go beside each other."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda name: adam_step(now[name], gradient[name], first[name], second[name], step, rates[name]), gradient))


def _sizes(weights: Weights) -> dict[str, float]:
    """The root mean square of each matrix; for vectors, which may be zero, at least the median of those."""
    sizes = {name: float(np.sqrt(np.mean(np.square(array, dtype=np.float64)))) for name, array in weights.items()}
    matrices = [sizes[name] for name, array in weights.items() if array.ndim > 1]
    usual = float(np.median(matrices)) if matrices else 0.0
    return {name: size if weights[name].ndim > 1 else max(size, usual) for name, size in sizes.items()}


def _rows(feeds: Feeds) -> int:
    """How many sentences or images a feed has."""
    return max(1, min((len(value) for value in feeds[0].values() if isinstance(value, np.ndarray) and value.ndim > 1), default=1))
