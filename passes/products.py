"""Products with the weight of a linear in float64, the weight read a tile at a time where it lies plainly in the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..graph.constant import fold
from ..graph.linear import Linear
from ..graph.weights import Values

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
        """Whether ``rows`` reads no more than the rows it is asked for."""
        return self.stored is not None and not self.turned

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` in float64."""
        if self.stored is None or self.turned:
            return self.load()[start:stop].astype(np.float64)
        return np.asarray(self.stored.rows(start, stop).astype(np.float64) * self.factor)

    def after(self, left: Array) -> Array:
        """``v W`` ``[d_out]`` for v ``[d_in]``, or ``M W`` ``[rows, d_out]`` for M ``[rows, d_in]``, in float64."""
        if self.stored is None:
            return np.asarray(left @ self.load().astype(np.float64))
        out = np.zeros((*left.shape[:-1], self.d_out))
        step = max(1, _TILE // max(self.stored.shape[1], 1))
        for start in range(0, self.stored.shape[0], step):
            stop = min(start + step, self.stored.shape[0])
            tile = self.stored.rows(start, stop).astype(np.float64)
            if self.turned:
                out[..., start:stop] = left @ tile.T
            else:
                out += left[..., start:stop] @ tile
        return out * self.factor
