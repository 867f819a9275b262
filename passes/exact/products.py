"""Products with the weight of a linear in float64, the weight read a tile at a time where it lies plainly in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.constant import fold
from ...graph.linear import Linear
from ...graph.weights import Values

Array = npt.NDArray[Any]
_TILE = 1 << 20  # elements
_PLAIN = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")


@dataclass(frozen=True)
class Weight:
    """The matrix ``W [d_in, d_out]`` of a linear, which may be gone from the graph when its numbers are asked for.

    Attributes:
        stored: the matrix as it is stored, if it can be read some rows at a time.
        turned: that is ``[d_out, d_in]``.
        factor: W is so many times what is stored.
    """

    d_in: int
    d_out: int
    load: Callable[[], Array]
    stored: Values | None
    turned: bool
    factor: float

    @classmethod
    def of(cls, linear: Linear) -> Weight:
        """The weight of ``linear``."""
        stored: Values | None = None
        if linear.kind in _PLAIN and linear.axis == -1 and not linear.packed:
            folded = fold(linear.node.inputs[1])
            if folded is not None and folded.sources and not folded.nodes and not folded.overridable:
                stored = folded.sources[0]._values
        attrs = linear.node.attrs
        return cls(linear.d_in, linear.d_out, linear.weight, stored if stored is not None and stored.by_rows else None,
                   bool(attrs.get("transB", 0)), float(attrs.get("alpha", 1.0)))

    @property
    def by_rows(self) -> bool:
        """Whether ``rows`` holds no more than the rows it is asked for and a tile."""
        return self.stored is not None

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` in float64. Where the matrix is stored turned, all of it is read, a tile at a time."""
        if self.stored is None:
            return self.load()[start:stop].astype(np.float64)
        if not self.turned:
            return np.asarray(self.stored.rows(start, stop).astype(np.float64) * self.factor)
        found = np.empty((stop - start, self.d_out))
        for first, tile in self._tiles():
            found[:, first:first + len(tile)] = tile[:, start:stop].T
        return found * self.factor

    def longest(self, axis: int, factors: Array | None = None) -> float:
        """The largest ‖·‖₂ of the columns of W (``axis`` 0) or of its rows (1), their numbers times ``factors``."""
        if self.stored is None:
            matrix = self.load().astype(np.float64)
            scaled = matrix if factors is None else matrix * (factors[:, None] if axis == 0 else factors)
            return float(np.sqrt(np.square(scaled).sum(axis=axis)).max(initial=0))
        along = axis == 0 if self.turned else axis == 1  # whether each row of a tile is one of the vectors
        squares = np.zeros(self.stored.shape[0 if along else 1])
        for start, tile in self._tiles():
            matrix = tile.astype(np.float64)
            if factors is not None:
                matrix *= factors if along else factors[start:start + len(tile), None]
            if along:
                squares[start:start + len(tile)] = np.square(matrix).sum(axis=1)
            else:
                squares += np.square(matrix).sum(axis=0)
        return float(np.sqrt(squares).max(initial=0)) * abs(self.factor)

    def _tiles(self) -> Iterator[tuple[int, Array]]:
        """First row and rows, as stored."""
        assert self.stored is not None
        step = max(1, _TILE // max(self.stored.shape[1], 1))
        for start in range(0, self.stored.shape[0], step):
            yield start, self.stored.rows(start, min(start + step, self.stored.shape[0]))

    @np.errstate(invalid="ignore")  # of weights that hold NaN
    def after(self, left: Array) -> Array:
        """``v W`` ``[d_out]`` for v ``[d_in]``, or ``M W`` ``[rows, d_out]`` for M ``[rows, d_in]``, in float64."""
        if self.stored is None:
            return np.asarray(left @ self.load().astype(np.float64))
        out = np.zeros((*left.shape[:-1], self.d_out))
        for start, rows in self._tiles():
            stop, tile = start + len(rows), rows.astype(np.float64)
            if self.turned:
                out[..., start:stop] = left @ tile.T
            else:
                out += left[..., start:stop] @ tile
        return out * self.factor
