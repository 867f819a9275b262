"""What passes measure inside a model: rows of values, streamed over the feeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.model import Model
from ...graph.residual import Sublayer
from ...runtime import Feeds, capture
from ..base import Context, Refused

Array = npt.NDArray[Any]


def unmeasurable(model: Model, block: Sublayer) -> Refused | None:
    """Why the values of ``block`` cannot be captured, or None."""
    return inside_subgraph(block) if block.graph is not model.graph else None


def inside_subgraph(block: Sublayer) -> Refused:
    """The refusal of a block whose values cannot be captured."""
    return Refused(f"it is inside the subgraph {block.path}, where ONNX Runtime gives no values out", block.output.name)


def rows(model: Model, tensors: Sequence[gs.Tensor], axes: Sequence[int], feeds: Feeds,
         context: Context) -> Iterator[list[Array]]:
    """The values of ``tensors``, a list of arrays ``[rows, features]`` for each feed, padding left out.

    Args:
        axes: where each tensor has its features, counted from the end.
    """
    names = [tensor.name for tensor in tensors]
    moved = {tensor.name: axis for tensor, axis in zip(tensors, axes, strict=True)}
    for values in capture(model, feeds, names, axes=moved, provider=context.provider,
                          threads=context.threads):
        yield [values[name] for name in names]


class RunningMean:
    """Mean of rows that stream by, in float64; rows with a number that is not finite do not count."""

    def __init__(self) -> None:
        self.rows = 0
        self._total: Array = np.zeros(0)

    def update(self, values: Array) -> None:
        """Add rows ``[rows, features]``."""
        finite = values[np.isfinite(values).all(axis=1)]
        self._total = finite.sum(axis=0, dtype=np.float64) + (self._total if self._total.size else 0.0)
        self.rows += len(finite)

    @property
    def mean(self) -> Array:
        """``[features]``."""
        return self._total / self.rows
