"""How far one output moved, added up tile by tile so that neither the outputs nor float64 copies of them are kept."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from .padding import Padding, rows_of
from .specs import Array

Metrics = dict[str, float | None]
_TILE = 1 << 20  # elements compared at once
_MOST_DB = 200.0
_MOST_THREADS = 8  # numpy computes without the lock of the interpreter; each has a few tiles of float64


class _Sums(NamedTuple):
    """What one tile adds."""

    nonfinite: int
    largest: float
    sum: float
    difference: float
    power: float
    distances: Array
    kl: float
    top1: int
    top5: int


class OutputMetrics:
    """The metrics of one output over all feeds. With r the reference, c the candidate, d = c − r, over unpadded rows:

    * ``max_abs`` = max |d|, ``mean_abs`` = mean |d|, ``rel_l2`` = ‖d‖ / ‖r‖ over all elements together;
    * ``sqnr_db`` = 10 log₁₀(‖r‖² / ‖d‖²), held within ±200 (200: no difference, or one that is nothing beside r);
    * ``cosine_mean``, ``cosine_p5`` (5th percentile), ``cosine_min`` over the cosines of rows; exactly 1 for rows that are
      equal, zero rows among them, and 0 where one of the two is zero;
    * ``kl_mean`` = mean over rows of KL(softmax r ‖ softmax c) in nats, ``top1`` and ``top5`` = the fraction of rows in which
      the reference's best class is the candidate's best, or among its best five (of equal ones the first is better);
      None where the output is not logits;
    * ``nonfinite`` = how many elements are infinite or NaN in the candidate and finite in the reference.

    All are None where there were outputs and no row in them: what is padding or empty has moved by no amount.

    Infinities of one sign are equal, and so are NaNs; elsewhere they make the metrics infinite or NaN, as arithmetic does.
    """

    def __init__(self, logits: bool) -> None:
        self.logits = logits
        self._updates = self._count = self._rows = self._nonfinite = self._top1 = self._top5 = 0
        self._max = self._sum = self._difference = self._power = self._kl = 0.0
        self._distances: list[Array] = []

    def update(self, reference: Array, candidate: Array, padding: Padding | None = None) -> None:
        """Add one run; both arrays have the same shape."""
        self._updates += 1
        ours, theirs = rows_of(reference, padding), rows_of(candidate, padding)
        if not ours.size:
            return
        step = max(1, _TILE // ours.shape[1])
        tiles = [slice(start, start + step) for start in range(0, len(ours), step)]
        sums = partial(_sums, ours, theirs, self.logits)
        if len(tiles) == 1:
            self._add(sums(tiles[0]))
        else:
            with ThreadPoolExecutor(min(_MOST_THREADS, len(tiles), os.cpu_count() or 1)) as pool:
                for each in pool.map(sums, tiles):  # in their order, so that the sums do not depend on the threads
                    self._add(each)
        self._count += ours.size
        self._rows += len(ours)

    def result(self) -> Metrics:
        """The metrics of what was added. Where nothing ever was: no drift."""
        distances = np.concatenate(self._distances) if self._distances else np.zeros(1, np.float32)
        mean = float(distances.mean(dtype=np.float64))
        found: Metrics = {
            "max_abs": self._max, "mean_abs": self._sum / max(1, self._count), "rel_l2": self._relative(),
            "sqnr_db": self._decibels(), "cosine_mean": 1.0 - mean,
            "cosine_p5": 1.0 - float(np.percentile(distances, 95)), "cosine_min": 1.0 - float(distances.max()),
            "kl_mean": None, "top1": None, "top5": None, "nonfinite": self._nonfinite}
        if self._updates and not self._rows:
            return dict.fromkeys(found)
        if self.logits:
            rows = max(1, self._rows)
            nothing = 0 if self._rows else 1
            found.update(kl_mean=self._kl / rows, top1=(self._top1 + nothing) / rows, top5=(self._top5 + nothing) / rows)
        return found

    def _add(self, tile: _Sums) -> None:
        self._nonfinite += tile.nonfinite
        self._max = float(np.maximum(self._max, tile.largest))  # keeps NaN
        self._sum += tile.sum
        self._difference += tile.difference
        self._power += tile.power
        self._kl += tile.kl
        self._top1 += tile.top1
        self._top5 += tile.top5
        self._distances.append(tile.distances)

    def _relative(self) -> float:
        if self._power > 0 or math.isnan(self._power):
            return math.sqrt(self._difference / self._power)
        return math.inf if self._difference > 0 else self._difference

    def _decibels(self) -> float:
        relative = self._relative()
        if math.isnan(relative):
            return math.nan
        if relative <= 0:
            return _MOST_DB
        return max(-_MOST_DB, min(_MOST_DB, -20 * math.log10(relative)))


def _sums(reference: Array, candidate: Array, logits: bool, tile: slice) -> _Sums:
    ours, theirs = reference[tile].astype(np.float64), candidate[tile].astype(np.float64)
    with np.errstate(all="ignore"):
        nonfinite = int((~np.isfinite(theirs) & np.isfinite(ours)).sum())
        found = _of_logits(ours, theirs) if logits else (0.0, 0, 0)
        odd = ~np.isfinite(ours)
        if odd.any():
            alike = odd & ((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)))
            ours, theirs = np.where(alike, 0.0, ours), np.where(alike, 0.0, theirs)
        size = np.abs(theirs - ours)
        return _Sums(nonfinite, float(size.max()), float(size.sum()), float(np.vdot(size, size)), float(np.vdot(ours, ours)),
                     _distances(ours, theirs, size), *found)


def _of_logits(ours: Array, theirs: Array) -> tuple[float, int, int]:
    """The sum of KL over rows, and in how many rows the reference's best class is the first, or among the first five."""
    p, q = _log_softmax(ours), _log_softmax(theirs)
    weight = np.exp(p)
    np.subtract(p, q, out=q)
    np.multiply(weight, q, out=q)
    divergence = np.where(weight > 0, q, np.where(np.isnan(weight), np.nan, 0.0)).sum(axis=1)
    best = ours.argmax(axis=1)
    chosen = np.take_along_axis(theirs, best[:, None], axis=1)
    rank = (theirs > chosen).sum(axis=1)
    rank += [int((row[:place] == value).sum()) for row, place, value in zip(theirs, best, chosen[:, 0], strict=True)]
    rank = np.where(np.isnan(theirs).any(axis=1), theirs.shape[1] + 5, rank)
    return float(np.where(divergence < 0, 0.0, divergence).sum()), int((rank < 1).sum()), int((rank < 5).sum())


def _distances(ours: Array, theirs: Array, size: Array) -> Array:
    """1 − cosine of each row: float32 ``[rows]``, which keeps small distances that a float32 cosine would round away."""
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = np.where(norms == 0, 0.0, np.einsum("rd,rd->r", ours, theirs) / norms)
    distances = np.where(size.max(axis=1) == 0, 0.0, 1.0 - np.clip(cosines, -1.0, 1.0))
    return distances.astype(np.float32)


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
