"""Whether a feed fits the inputs of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..graph.errors import InputError
from .specs import InputSpec


def check_keys(where: str, given: Iterable[str], inputs: Sequence[InputSpec]) -> None:
    """Check that ``given`` names every input that must be given, and no other.

    Raises:
        InputError: a name is missing or unknown.
    """
    given = set(given)
    names = [spec.name for spec in inputs]
    listed = ", ".join(names)
    unknown = sorted(given - set(names))
    if unknown:
        raise InputError(f"{where}: the model has no input '{unknown[0]}': its inputs are {listed}")
    missing = [spec for spec in inputs if spec.name not in given and not spec.optional]
    if missing:
        spec = missing[0]
        raise InputError(f"{where}: input '{spec.name}' is missing: add it as {spec.onnx_type} {spec.shape_text}")


def check_array(where: str, spec: InputSpec, dtype: np.dtype[Any], shape: Sequence[int]) -> None:
    """Check the type (in any byte order), the rank and the fixed dimensions of an array for ``spec``.

    Raises:
        InputError: one does not fit; says what was expected and what was given.
    """
    if not _fits(spec, dtype):
        if dtype.kind == "O":
            raise InputError(f"{where} holds pickled Python objects: expected {spec.dtype.name}, save it as an array of that")
        raise InputError(f"{where} has the wrong type: expected {spec.dtype.name}, given {dtype.name}")
    if spec.shape is None or not spec.is_tensor:
        return
    same = len(shape) == len(spec.shape) and all(
        not isinstance(expected, int) or expected == dim for expected, dim in zip(spec.shape, shape, strict=True))
    if not same:
        raise InputError(f"{where} has the wrong shape: expected {spec.shape_text}, given {list(shape)}")


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """``dtype`` in this machine's byte order."""
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def _fits(spec: InputSpec, dtype: np.dtype[Any]) -> bool:
    if spec.dtype == object:
        return dtype.kind in "US"
    if native(dtype) == spec.dtype:
        return True
    return bool(dtype.kind == "V" and spec.dtype.isbuiltin != 1 and dtype.itemsize == spec.dtype.itemsize)
