"""Whether two runs gave the same: types, shapes, and numbers up to rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .specs import Array


def disagreement(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """How the outputs ``after`` differ from ``before`` in kind, in one clause; None where they can be compared number by
    number: same names, types, shapes, and the same places that are not finite."""
    if list(before) != list(after):
        return "other outputs"
    for name, first in before.items():
        reason = _apart(first, after[name])
        if reason is not None:
            return f"output '{name}': {reason}"
    return None


def largest_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The largest ``max|after − before| / max|before|`` over the outputs, places that are not finite left out.

    Integers, booleans and strings count as infinitely different where they are not equal. Call it where
    :func:`disagreement` has nothing to say.
    """
    return max((_difference(first, after[name]) for name, first in before.items()), default=0.0)


def _apart(first: Any, second: Any) -> str | None:
    if first is None or second is None:
        return None if first is second else "one of the two is empty"
    if isinstance(first, list) or isinstance(second, list):
        if type(first) is not type(second) or len(first) != len(second):
            return "the sequences have different lengths"
        return next((reason for pair in zip(first, second, strict=True) if (reason := _apart(*pair)) is not None), None)
    if isinstance(first, dict) or isinstance(second, dict):
        return None if first == second else "the maps differ"
    a, b = np.asarray(first), np.asarray(second)
    if a.dtype != b.dtype:
        return f"type {a.dtype} became {b.dtype}"
    if a.shape != b.shape:
        return f"shape {list(a.shape)} became {list(b.shape)}"
    if not _is_float(a):
        return None
    a, b = _wide(a), _wide(b)
    same = np.isfinite(a) == np.isfinite(b)
    if not same.all():
        return f"{int((~same).sum())} numbers are finite in one of the two only"
    odd = ~np.isfinite(a)
    return None if np.array_equal(a[odd], b[odd], equal_nan=True) else "NaN and infinity in other places"


def _difference(first: Any, second: Any) -> float:
    if first is None or isinstance(first, dict):
        return 0.0
    if isinstance(first, list):
        return max((_difference(a, b) for a, b in zip(first, second, strict=True)), default=0.0)
    a, b = np.asarray(first), np.asarray(second)
    if not _is_float(a):
        return 0.0 if np.array_equal(a, b) else float("inf")
    a, b = _wide(a), _wide(b)
    finite = np.isfinite(a)
    gap = np.abs(b[finite] - a[finite]).max(initial=0)
    return float(gap / np.abs(a[finite]).max(initial=0)) if gap else 0.0


def _is_float(array: Array) -> bool:
    return array.dtype.kind in "fc" or (array.dtype.kind == "V" and "float" in array.dtype.name)


def _wide(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
