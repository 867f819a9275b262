"""Inputs made to tempt a rewrite: the edges of what a model takes, in the shapes of a feed that it does take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .specs import Array


def adversarial_feeds(feed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Variants of ``feed`` by what is odd about them. Shapes and types stay; no NaN, no infinity.

    Floating-point inputs become all zeros, one-hot rows, alternately ±1e4 (±1e30 in ``extreme``, ±the largest number in
    types that hold less) or denormal numbers. Integer inputs, where there are any: all zeros (an attention mask then shows
    nothing), and the feed's own numbers with every token the same. What a model does not take (an index out of range) is
    for the caller to find out.
    """
    found: dict[str, dict[str, Any]] = {}
    if any(_is_float(value) for value in feed.values()):
        for kind, make in _FLOATS.items():
            found[kind] = {name: make(value) if _is_float(value) else value for name, value in feed.items()}
    if any(_is_integer(value) for value in feed.values()):
        found["integers zero"] = {name: np.zeros_like(value) if _is_integer(value) else value for name, value in feed.items()}
        found["same token"] = {name: np.full_like(value, value.reshape(-1)[0]) if _is_integer(value) and value.size else value
                               for name, value in feed.items()}
    return found


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and (value.dtype.kind == "f" or "float" in value.dtype.name)


def _is_integer(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "iu"


def _one_hot(value: Array) -> Array:
    width = value.shape[-1] if value.ndim else 1
    rows = value.size // max(width, 1)
    flat = np.zeros((rows, width))
    if width:
        flat[np.arange(rows), np.arange(rows) % width] = 1
    return flat.reshape(value.shape).astype(value.dtype)


def _alternating(size: float) -> Callable[[Array], Array]:
    def make(value: Array) -> Array:
        signs = np.where(np.arange(value.size) % 3 == 1, -1.0, 1.0).reshape(value.shape)
        return (signs * min(size, _largest(value))).astype(value.dtype)
    return make


def _largest(value: Array) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(value.dtype).max)


def _denormal(value: Array) -> Array:
    import ml_dtypes

    smallest = float(ml_dtypes.finfo(value.dtype).smallest_subnormal)
    return (smallest * (1 + np.arange(value.size) % 7).reshape(value.shape)).astype(value.dtype)


_FLOATS: dict[str, Callable[[Array], Array]] = {
    "zeros": np.zeros_like, "one-hot": _one_hot, "large": _alternating(1e4), "extreme": _alternating(1e30),
    "denormal": _denormal}
