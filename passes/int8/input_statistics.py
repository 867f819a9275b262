"""What the feeds tell of the values that linears read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from ...graph.model import Model
from ...runtime import Feeds, capture
from ..base import Context
from .weight_codes import Array

_AT_ONCE = 32  # values captured in one run
_GRAMS = 512 << 20  # bytes of Gram matrices held at once
_BLOCK = 4096  # rows multiplied at once
_SAFE = 1e15  # magnitude whose squares, 4096 of them added up, are far from the largest float32
_ENOUGH = 64  # rows for each feature, as GPTQ takes 128 × 2048 tokens for 4096; with 16 MiniLM drifts a sixth further


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the rows of one value ``[*, d]`` that were taken, padding left out.

    Attributes:
        largest: the largest magnitude of each feature, ``[d]``.
        mean, mean_square: of each feature, ``[d]``.
        gram: ``XᵀX`` over these rows, ``[d, d]``; None where it was not asked for.
    """

    largest: Array
    mean: Array
    mean_square: Array
    gram: Array | None = None

    def divided(self, scale: Array) -> InputStatistics:
        """Those of ``x / s`` for ``scale`` s ``[d]``: each divided by s once or twice, the Gram matrix by ``s sᵀ``."""
        gram = None if self.gram is None else self.gram / scale / scale[:, None]
        return InputStatistics(self.largest / scale, self.mean / scale, self.mean_square / scale ** 2, gram)


class _Sums:
    """Sums over rows, in float64. Products are float32's: GPTQ adds a hundredth to the diagonal, 10⁵ times their rounding."""

    def __init__(self, gram: bool) -> None:
        self.rows = 0
        self.largest: Array = np.zeros(0)
        self.total: Array = np.zeros(0)
        self.squares: Array = np.zeros(0)
        self.gram: Array | None = np.zeros(0) if gram else None

    @property
    def full(self) -> bool:
        """Whether more rows would hardly help."""
        return self.rows >= _ENOUGH * len(self.largest) > 0

    def add(self, rows: Array) -> None:
        if self.full:
            return
        rows = rows[np.isfinite(rows).all(axis=1)]
        if not len(rows):
            return
        if not self.rows:
            self.largest, self.total, self.squares = (np.zeros(rows.shape[1]) for _ in range(3))
            self.gram = None if self.gram is None else np.zeros((rows.shape[1], rows.shape[1]))
        self.rows += len(rows)
        self.largest = np.maximum(self.largest, np.abs(rows).max(axis=0))
        self.total = self.total + rows.sum(axis=0, dtype=np.float64)
        if self.gram is None:
            self.squares = self.squares + np.einsum("rd,rd->d", rows, rows, dtype=np.float64)
            return
        kind = np.float32 if self.largest.max() < _SAFE else np.float64
        for start in range(0, len(rows), _BLOCK):
            part: Array = np.ascontiguousarray(rows[start:start + _BLOCK], kind)
            self.gram += part.T @ part

    def result(self) -> InputStatistics | None:
        if not self.rows:
            return None
        squares = self.squares if self.gram is None else np.diag(self.gram)
        return InputStatistics(self.largest, self.total / self.rows, squares / self.rows, self.gram)


def held_at_once(values: Sequence[tuple[gs.Tensor, int]]) -> bool:
    """Whether Gram matrices of all the values (with their widths) may be held together."""
    return sum(_bytes(width) for _, width in values) <= _GRAMS


def input_statistics(model: Model, values: Sequence[tuple[gs.Tensor, int]], feeds: Feeds, context: Context, *,
                     gram: bool = False) -> Iterator[tuple[gs.Tensor, InputStatistics | None]]:
    """Each value with its statistics (None where no finite row reached it), a few values at a time.

    Args:
        values: values of the main graph and their widths.
        feeds: they are taken from all over the sequence until there are 64 rows for each feature.
        gram: Gram matrices too; the feeds are run through as often as it takes to hold no more than 512 MB of them.
    """
    for part in _parts(values, gram):
        sums = {tensor.name: _Sums(gram) for tensor, _ in part}
        for captured in capture(model, feeds.mixed(), list(sums), provider=context.provider, threads=context.threads):
            for name, rows in captured.items():
                sums[name].add(rows)
            if all(each.full for each in sums.values()):
                break
        for tensor, _ in part:
            yield tensor, sums.pop(tensor.name).result()


def _parts(values: Sequence[tuple[gs.Tensor, int]], gram: bool) -> Iterator[list[tuple[gs.Tensor, int]]]:
    part: list[tuple[gs.Tensor, int]] = []
    held = 0
    for tensor, width in values:
        size = _bytes(width) if gram else 0
        if part and (len(part) == _AT_ONCE or held + size > _GRAMS):
            yield part
            part, held = [], 0
        part.append((tensor, width))
        held += size
    if part:
        yield part


def _bytes(width: int) -> int:
    return 8 * width * width
