"""Weights as integers: the scales, and the numbers that are stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_SHORTEST = 16  # block that ONNX Runtime has kernels for
_FRACTIONS = np.linspace(1.0, 0.5, 21)  # of the largest magnitude, tried by scale=mse


@dataclass(frozen=True)
class Rounding:
    """How a weight ``[d_in, d_out]`` is rounded: ``W[i, j] ≈ s[i // block, j] · q[i, j]``, q an integer.

    Attributes:
        largest: q lies between −largest and largest, and may be −largest − 1 where ``bits`` is 4.
        bits: 8 or 4.
        block: inputs that share a scale; None: all of a column.
        scale: ``max`` takes s from the largest magnitude, ``percentile`` from a percentile of the magnitudes, ``mse`` takes the
            one of 21 fractions of the largest that has the least squared error, each input weighted by its mean square where
            that is known.
        percentile: for ``percentile``.
    """

    largest: int = 127
    bits: int = 8
    block: int | None = None
    scale: Literal["max", "percentile", "mse"] = "max"
    percentile: float = 99.9

    def fitted(self, d_in: int) -> Rounding:
        """The same with blocks no longer than ``d_in`` inputs need: d_in rounded up to a power of two, 16 at least."""
        if self.block is None:
            return self
        return dataclasses.replace(self, block=min(self.block, max(_SHORTEST, 1 << (d_in - 1).bit_length())))

    def scales(self, weight: Array, importance: Array | None = None) -> Array | None:
        """The scales of ``weight``.

        Args:
            weight: ``[d_in, d_out]``.
            importance: ``[d_in]``, mean squares of the inputs.

        Returns:
            ``[blocks, d_out]`` float32, 1 for a block of zeros; None where a weight is not finite.
        """
        blocks = self._cut(weight.astype(np.float32))
        if not np.isfinite(blocks).all():
            return None
        top = self._top(blocks)
        if self.scale == "percentile":
            top = np.percentile(np.abs(blocks), self.percentile, axis=1).astype(np.float32) / np.float32(self.largest)
        elif self.scale == "mse":
            heights = np.ones(len(weight), np.float32) if importance is None else importance.astype(np.float32)
            top = self._least_error(blocks, top, self._cut(heights[:, None]))
        return np.where(np.abs(top) > 0, top, np.float32(1)).astype(np.float32)

    def codes(self, weight: Array, scales: Array) -> Array:
        """``q`` of ``weight``, int8 ``[d_in, d_out]``."""
        return self.rounded(weight.astype(np.float32) / self.spread(scales, len(weight))).astype(np.int8)

    def rounded(self, numbers: Array) -> Array:
        """Whole numbers between the smallest and the largest code."""
        return np.clip(np.rint(numbers), -self.largest - (self.bits == 4), self.largest)

    def spread(self, scales: Array, d_in: int) -> Array:
        """``scales`` so that they broadcast against the weight: ``[1 or d_in, d_out]``."""
        return scales if self.block is None else np.repeat(scales, self.block, axis=0)[:d_in]

    def _cut(self, weight: Array) -> Array:
        """``[blocks, rows of a block, d_out]``, zeros behind the last row."""
        block = self.block or len(weight)
        missing = -len(weight) % block
        padded = np.concatenate([weight, np.zeros((missing, weight.shape[1]), weight.dtype)]) if missing else weight
        return padded.reshape(-1, block, weight.shape[1])

    def _top(self, blocks: Array) -> Array:
        if self.bits == 4:  # the extreme number becomes −8, whatever its sign: 16 codes for it instead of 15
            at = np.abs(blocks).argmax(axis=1)[:, None]
            extreme: Array = np.take_along_axis(blocks, at, axis=1)[:, 0] / np.float32(-self.largest - 1)
            return extreme
        top: Array = np.abs(blocks).max(axis=1) / np.float32(self.largest)
        return top

    def _least_error(self, blocks: Array, top: Array, importance: Array) -> Array:
        best, least = top, np.full(top.shape, np.inf, np.float32)
        safe = np.where(np.abs(top) > 0, top, np.float32(1))
        for fraction in _FRACTIONS.astype(np.float32):
            for sign in (1, -1) if self.bits == 4 else (1,):
                scale = safe * (fraction * sign)
                error = blocks - self.rounded(blocks / scale[:, None]) * scale[:, None]
                cost = (error ** 2 * importance).sum(axis=1)
                better = cost < least
                best, least = np.where(better, scale, best), np.where(better, cost, least)
        return np.where(np.abs(top) > 0, best, 0)
