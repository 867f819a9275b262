"""What a step sees: rows enough to tell a direction, in one run where the model takes them together.

Rows come from feeds of the user's, often of one row each. Where every input is one of rows of the same number, which the model
leaves open, feeds of the same shape are put together; of texts that are joined anyway, the others of a step are given the frame
(length, padding, first token) of the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...graph.errors import InputError
from ...graph.model import Model
from ...runtime import Feeds
from ...runtime.specs import input_specs
from ..fitting.varied_pictures import VariedPictures
from .joined_texts import JoinedTexts
from .student import Student

Feed = Mapping[str, Any]
_SAME = 0.01
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
        self.together = max(1, -(-_ROWS // _rows(feeds[0])))
        self.stacked = self.together > 1 and _open_ended(model) and self._fit(student, provider)

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
                feeds = [texts.of(feeds[0], random), *(texts.of(feeds[0], random, 1.0) for _ in feeds[1:])] if self.stacked else \
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
        """Whether as many of the largest feed go through the student at once."""
        if not all(_even(feed) for feed in self._feeds):
            return False
        largest = max(self._feeds, key=lambda feed: sum(value.size for value in feed.values()))
        try:
            alone = student.targets(largest)
            if self.together * sum(each.tensor_size_in_bytes() for each in alone.values()) > _LARGEST[provider]:
                return False
            stacked = _stack([largest] * self.together)
            together = student.targets(stacked)
            return all(_is_of(together[name].shape(), each.shape(), self.together) for name, each in alone.items()) and \
                bool(np.isclose(student.loss(stacked), student.loss(largest), rtol=_SAME))
        except InputError:  # the export fixed what it calls open, or there is not enough memory
            return False


def _open_ended(model: Model) -> bool:
    """Whether all inputs share a first dimension that has a name."""
    specs = [spec for spec in input_specs(model) if not spec.optional]
    first = {spec.shape[0] if spec.is_tensor and spec.shape else None for spec in specs}
    return len(first) == 1 and isinstance(next(iter(first)), str)


def _is_of(stacked: Sequence[int], alone: Sequence[int], copies: int) -> bool:
    """Whether a shape is that of so many copies."""
    return bool(alone) and list(stacked) == [copies * alone[0], *alone[1:]]


def _even(feed: Feed) -> bool:
    """Whether all values are arrays of as many rows."""
    return all(isinstance(value, np.ndarray) and value.ndim for value in feed.values()) and \
        len({len(value) for value in feed.values()}) == 1


def _shapes(feed: Feed) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, value.shape) for name, value in sorted(feed.items()))


def _stack(feeds: Sequence[Feed]) -> Feed:
    return feeds[0] if len(feeds) == 1 else {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def _rows(feed: Feed) -> int:
    """How many sentences or images a feed has."""
    return max(1, min((len(value) for value in feed.values() if isinstance(value, np.ndarray) and value.ndim > 1), default=1))
