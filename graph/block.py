"""What an FFN block is: its projections, its activation, where it joins the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from .activation import Activation
from .constant import fold
from .edit import consumers, current, producer, remove_dead, take_over
from .linear import Linear
from .pointwise import Array
from .region import Region
from .residual import Join

OVERRIDABLE = "a weight is an input that the caller may override"
"""Why a block is left alone whose weights would be replaced by what was made of their defaults."""


@dataclass(eq=False)
class Projection:
    """A linear of a block, or those of its columns that the block uses as its up or gate projection.

    Attributes:
        linear: where the weight is.
        columns: which columns, None for all.
        extra_bias: constants added to the output behind the linear.
    """

    linear: Linear
    columns: npt.NDArray[np.int64] | None = None
    extra_bias: list[Callable[[], Array]] = field(default_factory=list)

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.linear.d_in

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.linear.d_out if self.columns is None else len(self.columns)

    @property
    def has_bias(self) -> bool:
        """Whether anything is added."""
        return self.linear.bias is not None or bool(self.extra_bias)

    def weight(self) -> Array:
        """A fresh array ``[d_in, d_out]`` (``[experts, d_in, d_out]`` if packed) in the block's type."""
        matrix = self.linear.weight()
        return matrix if self.columns is None else np.ascontiguousarray(matrix[..., self.columns])

    def bias(self) -> Array | None:
        """A fresh array ``[d_out]`` (``[experts, d_out]`` if packed), all constants added up, or None where there is none."""
        total: Array | None = None
        if self.linear.bias is not None:
            total = self.linear.bias()
            total = total if self.columns is None else total[self.columns]
        for extra in self.extra_bias:
            addend = extra().reshape((-1,) if self.linear.experts == 1 else (self.linear.experts, -1))
            total = addend if total is None else (total + addend).astype(total.dtype)
        return total


@dataclass(eq=False)
class FFNBlock:
    """One feed-forward block as it runs in the graph: ``y = down(act(gate x) ∘ up x) + b`` or ``y = down(act(up x)) + b``.

    Attributes:
        index: its place in ``inspect`` of the file.
        name: from the names of its nodes.
        path: the graph it is in (``main`` or a subgraph path); graph: that graph's view.
        input: ``x [*, d_model]``; output: ``y [*, d_out]``, bias included (features on ``axis``).
        up, down: projections; gate: the one under the activation in a gated block, else None.
        activation: name and form; region: the nodes between, as a function.
        join: where and how it reaches the residual stream.
        parallel: it reads what attention reads.
        experts: matrices packed in one weight. shares_weights_with: index of the first block with the same weights.
    """

    index: int
    name: str
    path: str
    graph: gs.Graph
    input: gs.Tensor
    output: gs.Tensor
    up: Projection
    gate: Projection | None
    down: Projection
    activation: Activation
    region: Region
    join: Join
    nodes: list[gs.Node]
    parallel: bool = False
    shares_weights_with: int | None = None

    @property
    def d_model(self) -> int:
        """Width of the input."""
        return self.up.d_in

    @property
    def d_ff(self) -> int:
        """Intermediate width (half of a fused gate-up)."""
        return self.down.d_in

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return self.down.d_out

    @property
    def gated(self) -> bool:
        """Whether two projections are multiplied."""
        return self.gate is not None

    @property
    def axis(self) -> int:
        """Where the features are, counted from the end: −1, or the channel axis of convolutions."""
        return self.down.linear.axis

    @property
    def experts(self) -> int:
        """Matrices packed in one weight."""
        return self.down.linear.experts

    @property
    def hidden(self) -> gs.Tensor:
        """``h [*, d_ff]``, the value that the down projection reads."""
        return self.region.output

    @property
    def onnx_type(self) -> int:
        """Element type of x and y."""
        return self.up.linear.onnx_type

    @property
    def quantized(self) -> bool:
        """Whether any of its weights is stored as integers."""
        return any(linear.quantized for linear in self.linears())

    @property
    def down_bias(self) -> bool:
        """Whether a constant is added behind the down projection (also inside a SkipLayerNormalization)."""
        fused = self.join.node.op.startswith("Skip") and len(self.join.node.inputs) > 4 and self.join.direct
        return self.down.has_bias or bool(fused and self.join.node.inputs[-1].name)

    @property
    def overridable(self) -> bool:
        """Whether a constant in it (a weight, a bias) is an input of the graph with a default, which the caller may override."""
        inside = [*self.nodes, *self.region.nodes, *(node for linear in self.linears() for node in linear.nodes)]
        unique = {id(node): node for node in inside}.values()
        return any(linear.overridable for linear in self.linears()) or any(
            folded is not None and folded.overridable for node in unique for folded in map(fold, node.inputs))

    def linears(self) -> list[Linear]:
        """Its linears, a fused gate-up once."""
        found = [self.up.linear, *([self.gate.linear] if self.gate else []), self.down.linear]
        return list({id(linear): linear for linear in found}.values())

    def sums(self) -> list[gs.Tensor]:
        """What its output and something else are added up to, right behind it."""
        return [value for node in consumers(self.output) if node.op == "Add" for value in node.outputs]

    @property
    def parameters(self) -> int:
        """Numbers in its weights and biases."""
        extra = sum(projection.d_out for projection in (self.up, self.gate, self.down)
                    if projection and projection.linear.bias is None and projection.has_bias)
        return sum(linear.parameters for linear in self.linears()) + extra

    @property
    def macs_per_token(self) -> int:
        """Multiply-adds for one row (of one expert)."""
        return sum(linear.d_in * linear.d_out for linear in self.linears())

    def settle(self) -> None:
        """Follow the values of the block that other rewrites have replaced since it was found."""
        self.input, self.output = current(self.input), current(self.output)
        self.join.branch, self.join.residual = current(self.join.branch), current(self.join.residual)
        self.region.output = current(self.region.output)
        for linear in self.linears():
            linear.input, linear.output = current(linear.input), current(linear.output)
        for leaf in self.region.leaves:
            leaf.tensor = current(leaf.tensor)

    def replace(self, y: gs.Tensor) -> None:
        """Put ``y`` (as wide and as long as ``output``) in the place of what the block gives.

        ``output`` keeps its name and its readers; what only the block needed is removed. What other nodes read from inside
        the block stays, and with it what computes it.
        """
        old = producer(self.output)
        take_over(self.output, y)
        remove_dead(self.graph, [old] if old is not None else [])

    def hidden_from(self, up: Array, gate: Array | None = None) -> Array:
        """``h`` in float64 from the projections' outputs with their biases, ``[*, d_ff]`` each; inner norms left out."""
        if self.gate is None:
            return self.region.evaluate([up], biased=True)
        leaves = [up, up]
        leaves[self.activation.gate] = gate if gate is not None else up
        return self.region.evaluate(leaves, biased=True)
