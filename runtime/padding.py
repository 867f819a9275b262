"""Which rows of a value are padding: tokens whose ``attention_mask`` is 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .specs import Array

MASKS = ("attention_mask", "decoder_attention_mask")
"""Inputs that say what is padding."""
_TOKENS = ("input_ids", "inputs_embeds")


class Padding:
    """The padding of one feed.

    A mask ``[batch, tokens]`` says what is padding in values whose leading dimensions are those, flattened to
    ``batch·tokens`` or not, in states ``[batch, heads, tokens, d]``, and in values ``[tokens, batch, …]``. Where both sizes are
    the same, and where rows are flattened, batch is taken to come first. Other values have none. Where a past is fed too, the
    mask is longer than the tokens and its end is theirs.
    """

    def __init__(self, feed: Mapping[str, Any]) -> None:
        self.masks: list[Array] = []
        for name in MASKS:
            mask = feed.get(name)
            if isinstance(mask, np.ndarray) and mask.ndim == 2 and not (mask != 0).all():
                self.masks.append(mask != 0)
                tokens = next((feed[key].shape[1] for key in _TOKENS if isinstance(feed.get(key), np.ndarray)
                               and feed[key].ndim >= 2 and len(feed[key]) == len(mask)), mask.shape[1])
                if name == MASKS[0] and 0 < tokens < mask.shape[1]:
                    self.masks.append(mask[:, -tokens:] != 0)

    def kept(self, shape: tuple[int, ...]) -> Array | None:
        """Which rows of a value of ``shape`` are no padding: bool ``[rows]``, a row to each index ahead of the last axis.

        None where all are kept.
        """
        leading = shape[:-1]
        for mask in self.masks:
            if leading[:2] == mask.shape:
                return _spread(mask, leading, (0, 1))
            if leading == (mask.size,):
                return mask.reshape(-1)
            if len(shape) == 4 and (leading[0], leading[2]) == mask.shape:
                return _spread(mask, leading, (0, 2))
            if leading[:2] == mask.shape[::-1]:
                return _spread(mask.T, leading, (0, 1))
        return None


def rows_of(value: Array, padding: Padding | None) -> Array:
    """``value`` as ``[rows, d]``, d the last axis, padding left out. A value of rank 0 or 1 is one row."""
    if value.ndim < 2:
        return value.reshape(1, -1)
    rows = value.reshape(-1, value.shape[-1]) if value.size else value.reshape(int(np.prod(value.shape[:-1])), value.shape[-1])
    kept = None if padding is None else padding.kept(value.shape)
    return rows if kept is None else rows[kept]


def _spread(mask: Array, leading: tuple[int, ...], axes: tuple[int, int]) -> Array:
    shape = [leading[axis] if axis in axes else 1 for axis in range(len(leading))]
    return np.broadcast_to(mask.reshape(shape), leading).reshape(-1)
