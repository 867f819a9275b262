"""What a step sees: rows enough to tell a direction, in one run where the model takes them together.

Rows come from feeds of the user's, often of one row each. Where every input is one of rows of the same number, which the model
leaves open, feeds of the same shape are put together; where there is nothing but texts, which are joined anyway, the others of a
step are given the frame (length, padding, first token) of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.errors import InputError
from ...graph.model import Model
from ...runtime import Feeds
from ...runtime.ort_values import to_array
from ...runtime.specs import input_specs
from ..fitting.varied_pictures import VariedPictures
from .joined_texts import JoinedTexts
from .student import Student

Array = npt.NDArray[Any]
Feed = Mapping[str, Any]
_SAME = 0.02  # of the largest value: a row beside others comes to that
_ROWS = 4  # sentences or images that a step sees at least
_LARGEST = {"cpu": 2 ** 28, "cuda": 2 ** 31}  # bytes of what is compared in one run; logits are large


class Batches:
    """Feeds for steps.

    Args:
        student: is asked what it can take; its weights have to be set.
        vary: make other texts and pictures of those of the feeds.

    Attributes:
        together: how many feeds a step sees.
        stacked: whether they may be put together.
    """

    def __init__(self, model: Model, feeds: Feeds, student: Student, provider: str, *, vary: bool) -> None:
        self._feeds = feeds
        texts, pictures = JoinedTexts(model, feeds), VariedPictures(model, feeds)
        self._texts = texts if vary and texts.any else None
        self._pictures = pictures if vary and pictures.any else None
        self.together = max(1, -(-_ROWS // rows_in(feeds[0])))
        self.stacked = self.together > 1 and _open_ended(model) and self._fit(student, provider)
        self._framed = self.stacked and all(value.dtype.kind in "iub" for value in feeds[0].values())

    def __len__(self) -> int:
        """Steps it takes to go through the feeds once."""
        return -(-len(self._feeds) // self.together)

    def of_epoch(self, random: np.random.Generator) -> Iterator[list[Feed]]:
        """For each step the feeds to run."""
        order = random.permutation(len(self._feeds)).tolist()
        for begin in range(0, len(order), self.together):
            feeds: list[Feed] = [self._feeds[number] for number in order[begin:begin + self.together]]
            if self._texts is not None:
                texts = self._texts
                feeds = [texts.of(feeds[0], random), *(texts.of(feeds[0], random, 1.0) for _ in feeds[1:])] if self._framed else \
                    [texts.of(feed, random) for feed in feeds]
            if self._pictures is not None:
                feeds = [self._pictures.of(feed, random) for feed in feeds]
            yield self._put_together(feeds)

    def _put_together(self, feeds: Sequence[Feed]) -> list[Feed]:
        """One feed for each shape."""
        groups: dict[object, list[Feed]] = {}
        for number, feed in enumerate(feeds):
            groups.setdefault(_shapes(feed) if self.stacked else number, []).append(feed)
        return [_stack(group) for group in groups.values()]

    def _fit(self, student: Student, provider: str) -> bool:
        """Whether as many of the largest feed go through the student at once, each row as if it were alone."""
        if not all(_even(feed) for feed in self._feeds):
            return False
        largest = max(self._feeds, key=lambda feed: sum(value.size for value in feed.values()))
        others = {name: np.roll(value, 1, axis=-1) for name, value in largest.items()}
        try:
            alone = student.targets(largest)
            if self.together * sum(each.tensor_size_in_bytes() for each in alone.values()) > _LARGEST[provider]:
                return False
            stacked = _stack([largest, *[others] * (self.together - 1)])
            beside = student.targets(stacked)
            if not all(_is_beginning(to_array(each), to_array(beside[name]), self.together) for name, each in alone.items()):
                return False
            student.add(stacked)
            return bool(student.gradient())
        except InputError:  # the export fixed what it calls open, or there is not enough memory
            return False


def _open_ended(model: Model) -> bool:
    """Whether all inputs share a first dimension that has a name."""
    specs = [spec for spec in input_specs(model) if not spec.optional]
    first = {spec.shape[0] if spec.is_tensor and spec.shape else None for spec in specs}
    return len(first) == 1 and isinstance(next(iter(first)), str)


def _is_beginning(alone: Array, stacked: Array, copies: int) -> bool:
    """Whether ``stacked`` has so many times the rows, the first of them those of ``alone``."""
    if not alone.ndim or stacked.shape != (copies * len(alone), *alone.shape[1:]) or not alone.size:
        return False
    return bool(np.allclose(stacked[:len(alone)], alone, rtol=0, atol=_SAME * float(np.abs(alone).max())))


def _even(feed: Feed) -> bool:
    """Whether all values are arrays of as many rows, with something in them."""
    return all(isinstance(value, np.ndarray) and value.ndim > 1 for value in feed.values()) and \
        len({len(value) for value in feed.values()}) == 1


def _shapes(feed: Feed) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, value.shape) for name, value in sorted(feed.items()))


def _stack(feeds: Sequence[Feed]) -> Feed:
    return feeds[0] if len(feeds) == 1 else {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def rows_in(feed: Feed) -> int:
    """How many sentences or images a feed has."""
    return max(1, min((len(value) for value in feed.values() if isinstance(value, np.ndarray) and value.ndim > 1), default=1))
