"""Two models on the same feeds, both in memory or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .feeds import Feed, Feeds
from .sessions import Session

_MOST_HELD = 1 << 28  # bytes of outputs of the first model, while the second is not open

Outputs = dict[str, Any]


def side_by_side(first: Session, second: Session, feeds: Feeds, names: Sequence[str]) -> Iterator[tuple[Feed, Outputs, Outputs]]:
    """Each feed, and what the two give."""
    for feed in feeds:
        yield feed, first.run(feed, names), second.run(feed, names)


def one_at_a_time(first: Callable[[], Session], second: Callable[[], Session], feeds: Feeds,
                  names: Sequence[str]) -> Iterator[tuple[Feed, Outputs, Outputs]]:
    """As :func:`side_by_side`, the memory of one model needed at a time.

    The first runs on a group of feeds, as many as have outputs of 256 MB in all, and is closed before the second runs on them.
    """
    start = 0
    while start < len(feeds):
        held: list[tuple[Feed, Outputs]] = []
        session, size = first(), 0
        for feed in feeds[start:]:
            held.append((feed, session.run(feed, names)))
            size += sum(getattr(value, "nbytes", 0) for value in held[-1][1].values())
            if size >= _MOST_HELD:
                break
        del session
        start += len(held)
        session = second()
        while held:
            feed, ours = held.pop(0)
            yield feed, ours, session.run(feed, names)
            del ours
        del session
