"""Whether a model stays the same where padding is skipped: tried with padding at the end, in front, and as feeds have it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...graph.model import Model
from ...runtime import Feed, Feeds, InputSpec, open_session, synthetic_feeds
from ..base import Context, Refused
from .trial import why_not_same

MASK = "attention_mask"
SIZES = ((3, 8), (2, 5))  # batch and tokens of made-up feeds
_SIDES = ("at the end", "in front")
_LOOKED_AT = 64  # feeds, of which the one with the most padding is tried
_LEAK = 1e-4


def made_up(model: Model, specs: Sequence[InputSpec], sizes: tuple[int, int], side: str = _SIDES[0]) -> Feed:
    """A feed in which every sequence has more padding than the one before it; all other inputs are as if there were none."""
    shape = next(spec.shape for spec in specs if spec.name == MASK)
    assert shape is not None
    batch, tokens = wanted = tuple(dim if isinstance(dim, int) else size for dim, size in zip(shape, sizes, strict=True))
    feed = dict(synthetic_feeds(specs, {MASK: wanted}, model=model)[0])
    lengths = np.linspace(tokens, max(1, tokens // 3), batch + 1)[1:].astype(int)
    mask = np.arange(tokens) < lengths[:, None]
    feed[MASK] = (mask if side == _SIDES[0] else mask[:, ::-1]).astype(feed[MASK].dtype)
    return feed


def try_padding(model: Model, packed: Model, other: Model, bound: float, context: Context,
                specs: Sequence[InputSpec]) -> Refused | tuple[str, ...]:
    """Why ``packed`` may not take the place of ``model``, or what the user should know of it.

    Args:
        other: packed as well, but with other tokens in the rows of padding: what comes out otherwise reads those.
        bound: relative error that ``packed`` may have.

    Raises:
        InputError: ONNX Runtime fails at one of them.
    """
    sessions = [open_session(each, provider=context.provider, threads=context.threads, lean=True)
                for each in (model, packed, other)]

    def wrong(feed: Feed) -> Refused | None:
        feeds, reads = Feeds.of([feed]), "it reads rows that are padding, or holds a number for each"
        otherwise = "it comes out otherwise without the rows that are padding"
        return (why_not_same(sessions[2], sessions[1], feeds, _LEAK, reads, context)
                or why_not_same(sessions[0], sessions[1], feeds, bound, otherwise, context))

    try:
        given = _most_padded(context.fit)
        found = None if given is None else wrong(given)
        if found is not None:
            return found
        sides = {side: wrong(made_up(model, specs, SIZES[0], side)) for side in _SIDES}
    finally:
        for session in sessions:
            session.close()
    end, front = (sides[side] for side in _SIDES)
    if end is not None and (given is None or front is not None):
        return end
    return tuple(f"output '{refused.value}' comes out otherwise where texts are padded {side}"
                 for side, refused in sides.items() if refused is not None)


def _most_padded(feeds: Feeds | None) -> Feed | None:
    padded = [(float(np.mean(feed[MASK] != 0)), number) for number, feed in enumerate((feeds or [])[:_LOOKED_AT]) if MASK in feed]
    share, number = min(padded, default=(1.0, 0))
    return None if share == 1.0 or feeds is None else feeds[number]
