"""Linears that read one value: what is done to the value is done once for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from ...graph.activation import GRID
from ...graph.block import FFNBlock
from ...graph.linear import Linear

_FAR = np.concatenate([GRID, [-1e3, -100.0, -30.0, 30.0, 100.0, 1e3]])
_DEEPEST = 0.35  # of GELU, SiLU and Mish, none goes deeper


@dataclass(eq=False)
class LinearGroup:
    """Linears that read one value.

    Attributes:
        name: begins the names of what is added.
        path, graph: the graph they are in.
        linears: in order of execution.
        block: the FFN block they belong to, None for other linears.
        down: they read what an activation gives.
        lowest: no number they read lies below −lowest; None where nothing is known.
        smoothed: large channels were taken out of what they read.
        loud: one scale for all rows of what they read would cost a row too much; None where nothing was measured.
    """

    name: str
    path: str
    graph: gs.Graph
    linears: list[Linear]
    block: FFNBlock | None = None
    down: bool = False
    lowest: float | None = None
    smoothed: bool = False
    loud: bool | None = None

    @property
    def input(self) -> gs.Tensor:
        """The value they read, ``[*, d_in]``."""
        return self.linears[0].input

    @property
    def d_in(self) -> int:
        """Its width."""
        return self.linears[0].d_in

    @property
    def onnx_type(self) -> int:
        """Its element type."""
        return self.linears[0].onnx_type


def block_groups(block: FFNBlock) -> list[LinearGroup]:
    """The linears of an FFN block: those that read its input, and the down projection."""
    down = block.down.linear
    first = [linear for linear in block.linears() if linear is not down]
    return [LinearGroup(block.name, block.path, block.graph, first, block),
            LinearGroup(block.name, block.path, block.graph, [down], block, True, _depth(block))]


def _depth(block: FFNBlock) -> float | None:
    """How far below zero the hidden values of an ungated block can go: 0.17 behind GELU, 0.28 behind SiLU, 0 behind ReLU.

    None where they are signed: behind a gate, tanh, or anything that goes deeper than 0.35.
    """
    if block.gated or block.region.inner_norm or any(leaf.linear.fused_activation for leaf in block.region.leaves):
        return None
    hidden = block.region.evaluate([np.broadcast_to(_FAR[:, None], (len(_FAR), block.d_ff))], biased=True)
    depth = -float(np.min(hidden, initial=0.0))
    return 1.01 * depth if depth <= _DEEPEST else None  # NaN is not


def is_matrix(linear: Linear) -> bool:
    """Whether the weight is one matrix over the last axis, so that it can be written ``[d_in, d_out]``."""
    return linear.axis == -1 and linear.experts == 1 and not linear.gathered


def is_plain(group: LinearGroup) -> bool:
    """Whether the linears are single matrices over the last axis, multiplied from the right."""
    return all(is_matrix(linear) and linear.node.inputs[0] is linear.input for linear in group.linears)


def merged(groups: Iterable[LinearGroup]) -> list[LinearGroup]:
    """Groups of one graph that read the same value become one (attention and FFN in parallel); each linear once."""
    found: dict[tuple[int, int], LinearGroup] = {}
    for group in groups:
        for linear in group.linears:
            key = (id(group.graph), id(linear.input))
            known = found.get(key)
            if known is None:
                found[key] = LinearGroup(group.name, group.path, group.graph, [linear], group.block, group.down, group.lowest)
            elif all(linear.node is not other.node for other in known.linears):
                known.linears.append(linear)
    return list(found.values())
