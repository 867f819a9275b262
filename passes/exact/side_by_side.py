"""Matrices put beside each other, a tile at a time where they lie plainly in the file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...graph.constant import Folded
from ...graph.pointwise import Array
from ...graph.weights import ComputedValues, Values


def side_by_side(matrices: Sequence[Folded], axis: int) -> Values:
    """``matrices``, of one type, joined on ``axis``."""
    shape = list(matrices[0].shape)
    shape[axis] = sum(each.shape[axis] for each in matrices)
    plain = [each.sources[0]._values for each in matrices if not each.nodes and each.sources]

    def rows(start: int, stop: int) -> Array:
        if axis == 1:
            return np.concatenate([values.rows(start, stop) for values in plain], axis=1)
        parts, first = [], 0
        for values in plain:
            low, high = max(start - first, 0), min(stop - first, values.shape[0])
            if low < high:
                parts.append(values.rows(low, high))
            first += values.shape[0]
        return np.concatenate(parts)

    return ComputedValues((shape[0], shape[1]), matrices[0].onnx_type,
                          lambda: np.concatenate([each.load() for each in matrices], axis=axis),
                          rows if len(plain) == len(matrices) else None)
