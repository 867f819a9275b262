"""Values inside a model, streamed over feeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..graph.errors import InputError
from .feeds import Feeds
from .padding import Padding, rows_of
from .sessions import Session, Source, open_session
from .specs import Array


def capture(source: Source, feeds: Feeds, names: Sequence[str], *, axes: Mapping[str, int] | None = None,
            provider: str = "cpu", threads: int | None = None) -> Iterator[dict[str, Array]]:
    """The values called ``names`` as rows of features, padding left out, a dict for each feed. Nothing is kept.

    Args:
        names: values of the main graph.
        axes: where a value has its features, as an axis (negative: counted from the end); the last where nothing is said.

    Returns:
        name → ``[rows, features]``, float32 (float64 where the model computes in that, or in int32 or wider). Values with
        the same leading dimensions have the same rows in the same order. A value of rank 0 or 1 is one row.

    Raises:
        InputError: no such value, or ONNX Runtime fails.
    """
    for values, padding in _run(source, feeds, names, provider, threads):
        yield {name: as_rows(value, (axes or {}).get(name, -1), padding) for name, value in values.items()}


def capture_raw(source: Source, feeds: Feeds, names: Sequence[str], *, provider: str = "cpu",
                threads: int | None = None) -> Iterator[dict[str, Array]]:
    """The values called ``names`` in the shapes and types they have in the model, padding included."""
    return (values for values, _ in _run(source, feeds, names, provider, threads))


def _run(source: Source, feeds: Feeds, names: Sequence[str], provider: str,
         threads: int | None) -> Iterator[tuple[dict[str, Array], Padding]]:
    wanted = list(dict.fromkeys(names))
    session = open_session(source, provider=provider, threads=threads, outputs=wanted, only=True)
    _check_tensors(session, wanted)
    for feed in feeds:
        yield session.run(feed, wanted), Padding(feed)


def _check_tensors(session: Session, names: Sequence[str]) -> None:
    kinds = {spec.name: spec.onnx_type for spec in session.outputs if not spec.is_tensor or spec.dtype == object}
    for name in names:
        if name in kinds:
            raise InputError(f"{session.name}: value '{name}' is {kinds[name]}, which has no rows: choose a tensor")


def as_rows(value: Array, axis: int, padding: Padding) -> Array:
    """``value``, whose features are on ``axis``, as ``[rows, features]`` without padding, in float32 or float64."""
    if value.ndim >= 2:
        value = np.moveaxis(value, axis, -1)
    rows = rows_of(value, padding)
    wide = rows.dtype.kind in "iu" and rows.dtype.itemsize >= 4
    return rows.astype(np.float64 if wide or rows.dtype == np.float64 else np.float32, copy=False)
