"""How much each token counts in a least-squares fit.

A few tokens (the first, separators) carry values a hundred times the rest and would own an unweighted fit, though the norm
behind the block divides their size out again. So each counts by the inverse of its size in front of that norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.edit import producer
from ...graph.region import NORMS
from .bypass import is_pure_branch

Array = npt.NDArray[Any]
_FLOOR = 1e-3  # of the average size: tokens near zero must not own the fit either


def weight_values(block: FFNBlock, kind: str) -> list[gs.Tensor]:
    """What must be captured beside x and y to weight tokens: the residual that y joins, or nothing."""
    if kind == "none" or has_branch_norm(block) or not block.join.direct or not is_pure_branch(block):
        return []
    return [block.join.residual]


def token_weights(block: FFNBlock, y: Array, others: Sequence[Array], kind: str) -> Array:
    """Weights of the rows of y ``[n, d]``: 1 / (size of what the next norm divides by + 1e-3 · average)."""
    if kind == "none" or not len(y):
        return np.ones(len(y))
    stream = y.astype(np.float64)
    with np.errstate(all="ignore"):  # what is not finite stays so, and whoever fits leaves it out
        if others and others[0].shape == y.shape:
            stream = stream + others[0]
            stream = stream - stream.mean(axis=1, keepdims=True)
        size = (stream ** 2).mean(axis=1)
        finite = size[np.isfinite(size)]
        average = float(finite.mean()) if len(finite) else 0.0
        return 1.0 / (size + _FLOOR * average) if average > 0 else np.ones(len(y))


def has_branch_norm(block: FFNBlock) -> bool:
    """Whether a norm lies between the block and the residual Add."""
    tensor = block.join.branch
    for _ in range(24):
        node = producer(tensor)
        if node is None or tensor is block.output:
            return False
        if node.op in NORMS or node.op in ("Sqrt", "ReduceMean", "Pow"):
            return True
        operands = [value for value in node.inputs if value.inputs]
        if not operands:
            return False
        divided = next((value for value in operands if value.inputs[0].op in ("Sqrt", "Reciprocal", "Div", "Rsqrt")), None)
        tensor = divided if divided is not None else operands[0]
    return False
