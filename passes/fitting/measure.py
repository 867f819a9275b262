"""What passes measure inside a model: rows of values, streamed over the feeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass
class Finite:
    """Picks the tokens whose values are all finite, as they stream by.

    Attributes:
        seen: how many there were.
    """

    seen: int = 0

    def __call__(self, *groups: Array) -> Array:
        """Which rows to take: bool ``[rows]``. Groups are ``[rows, features]`` or ``[rows]``."""
        good = np.ones(len(groups[0]), bool)
        for group in groups:
            good &= np.isfinite(group) if group.ndim == 1 else np.isfinite(group).all(axis=1)
        self.seen += len(good)
        return good

    def why_none(self, value: str) -> Refused:
        """Why there is no token to measure ``value`` on, where none was taken."""
        reason = (f"none of the {self.seen} tokens that reached it has finite values" if self.seen
                  else "no token of the feeds reached it")
        return Refused(reason, value)


class RunningMean:
    """Mean of rows that stream by, in float64; rows with a number that is not finite do not count."""

    def __init__(self) -> None:
        self.rows = 0
        self.finite = Finite()
        self._total: Array = np.zeros(0)

    def update(self, values: Array) -> None:
        """Add rows ``[rows, features]``."""
        finite = values[self.finite(values)]
        self._total = finite.sum(axis=0, dtype=np.float64) + (self._total if self._total.size else 0.0)
        self.rows += len(finite)

    @property
    def mean(self) -> Array:
        """``[features]``."""
        return self._total / self.rows
