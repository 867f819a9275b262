"""Where the constant part of what a block adds can go instead: the closest bias behind it.

    post-norm   norm(r + f + b) = norm(r + f) + Δ            β ← β + E[Δ]
    pre-norm    (r + f + b) + (g + c) = (r + f) + (g + (c + b))    the bias of what is added to the stream next

The second is exact where nothing reads the stream in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.constant import fold
from ...graph.edit import consumers, is_output, producer
from ...graph.linear import read_linear
from ...graph.norm import Norm
from .bias_places import norm_of

Array = npt.NDArray[Any]
_EPSILON = 1e-6


@dataclass(frozen=True)
class LaterBias:
    """A constant behind a block.

    Attributes:
        node, index: where it is read.
        norm: the norm whose shift it is; None for the bias of a linear.
        exact: nothing reads the stream before it is added.
    """

    node: gs.Node
    index: int
    norm: Norm | None
    exact: bool


def later_bias(block: FFNBlock) -> LaterBias | None:
    """The closest one that what the block adds can move to; None where there is none."""
    join = block.join
    readers = consumers(block.output)
    if len(readers) == 1 and readers[0].op == "Add":
        found = _bias_of(_other(readers[0], block.output))
        if found is not None:
            return LaterBias(*found, None, True)
    if not join.direct or join.node.op != "Add":
        return None
    total = join.node.outputs[0]
    norm = norm_of(block.graph, total)
    if norm is not None and norm.shift_at is not None and norm.shift is not None and not norm.shift.overridable:
        return LaterBias(norm.shift_at.node, norm.shift_at.index, norm, False)
    for node in consumers(total):
        if node.op == "Add":
            found = _bias_of(_other(node, total))
            if found is not None:
                return LaterBias(*found, None, len(consumers(total)) == 1 and not is_output(block.graph, total))
    return None


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _bias_of(tensor: gs.Tensor) -> tuple[gs.Node, int] | None:
    """The bias of the linear that ``tensor`` is, and that nothing else reads."""
    node = producer(tensor)
    if node is None or len(consumers(tensor)) != 1:
        return None
    if node.op == "Add":
        at = next((index for index, value in enumerate(node.inputs) if fold(value) is not None), None)
        before = producer(node.inputs[1 - at]) if at is not None else None
        linear = read_linear(before) if before is not None else None
        folded = fold(node.inputs[at]) if at is not None else None
        if linear is None or at is None or folded is None or linear.output is not tensor or folded.overridable:
            return None
        return node, at
    linear = read_linear(node)
    if linear is None or linear.bias is None or node.op != "Gemm" or linear.output is not tensor:
        return None
    folded = fold(node.inputs[2])
    return None if folded is None or folded.overridable else (node, 2)


def through_norm(norm: Norm, stream: Array, constants: Sequence[Array]) -> list[Array]:
    """What ``norm`` gives, without its shift, for the rows of ``stream`` with each of ``constants`` added: ``[rows, d]``."""
    scale = norm.scale.load().astype(np.float64).reshape(-1)
    found = []
    for constant in constants:
        rows = stream + constant
        rows = rows - rows.mean(axis=1, keepdims=True) if norm.centred else rows
        found.append(rows / np.sqrt((rows ** 2).mean(axis=1, keepdims=True) + _EPSILON) * scale)
    return found
