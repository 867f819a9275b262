"""Which activations need a scale for each row: those that one scale for the tensor would drown in rounding noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ...graph.model import Model
from ...runtime import capture
from ..base import Context
from .linear_groups import LinearGroup
from .weight_codes import Array

LOUD = 0.05  # of a row's signal, from which on rows are worth their elementwise passes
_FEEDS = 8
_AT_ONCE = 32  # values captured in one run


def measure_rows(model: Model, groups: Sequence[LinearGroup], context: Context) -> None:
    """Set ``loud`` of the groups whose input can be measured, on eight of the feeds to fit on, spread evenly."""
    assert context.fit is not None
    feeds = context.fit[::max(1, len(context.fit) // _FEEDS)][:_FEEDS]
    known = {group.input.name: group for group in groups if group.graph is model.graph}
    names = list(known)
    for start in range(0, len(names), _AT_ONCE):
        part = names[start:start + _AT_ONCE]
        seen: dict[str, list[Array]] = {name: [] for name in part}
        for captured in capture(model, feeds, part, provider=context.provider, threads=context.threads):
            for name, rows in captured.items():
                seen[name].append(row_noise(rows))
        for name, noise in seen.items():
            known[name].loud = is_loud(noise)


def row_noise(rows: Array) -> Array:
    """What one uint8 scale for all ``rows`` ``[n, d]`` costs each of them, as a share of its signal, ``[n]``.

        (max − min) / (255 √12) / √(mean_j x_j²),  at most 1

    A uniform rounding error of step Δ has the root mean square Δ / √12; 0 is always among the codes.
    """
    finite = rows[np.isfinite(rows).all(axis=1)].astype(np.float64)
    if not finite.size:
        return np.zeros(0)
    noise = (max(finite.max(), 0.0) - min(finite.min(), 0.0)) / (255 * np.sqrt(12))
    signal = np.sqrt((finite ** 2).mean(axis=1))
    found: Array = np.minimum(noise / np.maximum(signal, np.finfo(np.float64).tiny), 1.0) * (signal > 0)
    return found


def is_loud(noise: Iterable[Array]) -> bool:
    """Whether the root mean square of the rows' noise is more than ``LOUD``."""
    every = np.concatenate([np.zeros(1), *noise])
    return bool(np.sqrt((every ** 2).mean()) > LOUD)
