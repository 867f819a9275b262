"""More inputs to fit on, made from those there are: the model itself says what the right answer is.

What limits a fit is not the number of tokens but of different sentences: in the last blocks all tokens of a sentence are much
alike. In a varied copy of a feed a part of its tokens is replaced by others of the vocabulary, drawn evenly, so that words and
contexts appear that the feeds do not hold. Tokens that stand in most rows (the first, separators) and padding stay. Of pictures
see :mod:`varied_pictures`.

Inputs that are neither stay as they are; a model without tokens and pictures has no varied copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.constant import fold
from ...graph.edit import consumers
from ...graph.model import Model
from ...runtime import Feeds
from ...runtime.padding import Padding
from .varied_pictures import VariedPictures

Array = npt.NDArray[Any]
SHARE = 0.2  # of the tokens that are replaced
_FEWEST_WORDS = 256  # a smaller table is one of token types
_IN_MOST_ROWS = 0.5
_FEWEST_ROWS = 8  # to tell what stands in most rows
_PASSED = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_TABLES = {"Gather": (1, 0), "GatherBlockQuantized": (1, 0), "EmbedLayerNormalization": (0, 2)}  # op → where ids, table


def token_inputs(model: Model) -> dict[str, int]:
    """Inputs of the main graph that are looked up in a table of words → how many words it has."""
    found = {}
    for tensor in model.graph.inputs:
        words = _words(tensor)
        if words >= _FEWEST_WORDS:
            found[tensor.name] = words
    return found


def _words(tensor: gs.Tensor) -> int:
    pending, most = [tensor], 0
    for _ in range(64):
        if not pending:
            break
        value = pending.pop()
        for node in consumers(value):
            if node.op in _PASSED and node.inputs[0] is value:
                pending += node.outputs
            elif node.op in _TABLES:
                ids, table = _TABLES[node.op]
                folded = fold(node.inputs[table]) if len(node.inputs) > table and node.inputs[ids] is value else None
                if folded is not None and len(folded.shape) == 2:
                    most = max(most, folded.shape[0])
    return most


def varied(model: Model, feeds: Feeds, copies: int) -> Feeds:
    """``feeds``, and behind them ``copies`` varied copies of all of them; ``feeds`` alone where none can be made."""
    words = token_inputs(model) if copies else {}
    fixed = {name: in_most_rows(feeds, name) for name in words}
    pictures = VariedPictures(model, feeds) if copies else None
    if not words and (pictures is None or not pictures.any):
        return feeds
    loaders: list[Any] = [partial(feeds.__getitem__, number) for number in range(len(feeds))]
    loaders += [partial(_vary, feeds, number, copy, words, fixed, pictures) for copy in range(copies)
                for number in range(len(feeds))]
    return Feeds(loaders, synthetic=feeds.synthetic)


def in_most_rows(feeds: Feeds, name: str) -> Array:
    """Tokens of the input ``name`` that stand in most rows (the first, separators): int64 ``[n]``."""
    counts: Counter[int] = Counter()
    rows = 0
    for feed in feeds:
        if name in feed:
            ids = np.atleast_2d(feed[name])
            rows += len(ids)
            for row in ids:
                counts.update(np.unique(row).tolist())
    most = [token for token, count in counts.items() if count > _IN_MOST_ROWS * rows and rows >= _FEWEST_ROWS]
    return np.array(most, np.int64)


def loose_tokens(feed: Mapping[str, Any], name: str, fixed: Array) -> Array | None:
    """Which tokens of the input ``name`` may be others: bool ``[batch, tokens]``; None where it holds no texts.

    Padding, the first token of each row and the tokens in ``fixed`` stay.
    """
    ids = feed.get(name)
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or _are_positions(ids):
        return None
    kept = Padding(feed).kept((*ids.shape, 1))
    loose = np.ones(ids.shape, bool) if kept is None else kept.reshape(ids.shape)
    loose = loose & ~np.isin(ids, fixed)
    loose[:, :1] = False
    return loose


def _vary(feeds: Feeds, number: int, copy: int, words: dict[str, int], fixed: dict[str, Array],
          pictures: VariedPictures | None) -> dict[str, Any]:
    random = np.random.default_rng((number, copy))
    feed = dict(feeds[number]) if pictures is None else pictures.of(feeds[number], random, mix=False)  # others may be held out
    for name, count in words.items():
        loose = loose_tokens(feed, name, fixed[name])
        if loose is not None:
            ids = feed[name]
            loose &= random.random(ids.shape) < SHARE
            feed[name] = np.where(loose, random.integers(0, count, ids.shape), ids).astype(ids.dtype)
    return feed


def _are_positions(ids: Array) -> bool:
    return ids.shape[1] > 1 and bool((np.diff(ids, axis=1) == 1).all())
