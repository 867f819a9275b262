"""What lies between the linears of a block: walked backwards from the input of the down projection.

    x ──► up ──► z ──┐                       leaves: z (and g), outputs of linears, possibly a choice of their columns
                     ├─► pointwise … ──► h ──► down
    x ──► gate ► g ──┘                       region: every node from the leaves to h

The walk passes operators that act on each number alone, reshapes of the leading axes, casts, and norms over the
features; it ends at linears and constants, and gives up, with a reason, at anything that mixes tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from .columns import Selection, select
from .constant import Array, Folded, fold
from .edit import producer
from .linear import Linear
from .picked import picked
from .pointwise import CONTRIB_WITH_BIAS, FUSED, POINTWISE
from .rejection import Refusal
from .shapes import ALIASES, turn_axis

_LARGEST = 160  # nodes; the longest decomposed activation with an inner norm has about 30
_MOST_LINEARS = 2  # up and gate
NORMS = frozenset({"LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization", "LpNormalization"})
_PASS_ON = frozenset({"Identity", "Cast", "Dropout"})
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSumSquare", "ReduceL2"})


@dataclass(eq=False)
class Leaf:
    """A value where a region begins: the output of a linear, or some of its columns.

    Attributes:
        tensor: the value.
        linear: what it comes from.
        columns: which columns of that, None for all.
        added: constants that were added before the columns were cut out, already cut.
    """

    tensor: gs.Tensor
    linear: Linear
    columns: Selection = None
    added: list[Folded] = field(default_factory=list)


@dataclass(eq=False)
class Region:
    """The nodes from the leaves to ``output``, and what they compute.

    Attributes:
        output: the value that the down projection reads.
        width: number of features (d_ff).
        leaves: where it begins.
        nodes: its nodes, producers first (also those that cut a fused gate-up).
        steps: the nodes that compute, without those that cut; producers first.
        inner_norm: it holds a norm over the features, so neurons are not independent.
        biases: constants added straight to a leaf: leaf number → the constants.
    """

    output: gs.Tensor
    width: int
    leaves: list[Leaf] = field(default_factory=list)
    nodes: list[gs.Node] = field(default_factory=list)
    inner_norm: bool = False
    biases: dict[int, list[Folded]] = field(default_factory=dict)
    steps: list[gs.Node] = field(default_factory=list)
    _constants: dict[int, Folded] = field(default_factory=dict)
    bias_values: set[tuple[int, int]] = field(default_factory=set)

    def evaluate(self, leaves: Sequence[Array], *, neuron: int | None = None, biased: bool = False) -> Array:
        """h for given leaf values, in float64.

        Args:
            leaves: one array a leaf, ``[*, width]``; with ``neuron`` any shape, every number taken as that neuron's.
            neuron: use the constants of this neuron only.
            biased: the leaves already hold the constants in ``biases``, which are then left out.

        Norms inside the region count as the identity.
        """
        values: dict[int, Array] = {}
        for leaf, array in zip(self.leaves, leaves, strict=True):
            start = np.asarray(array, np.float64)
            for folded in [] if biased else leaf.added:
                start = start + self._numbers(folded, neuron)
            fused = leaf.linear.fused_activation
            values[id(leaf.tensor)] = start if fused is None else FUSED[fused[0]](start, fused[1])
        with np.errstate(all="ignore"):
            for node in self.steps:
                values[id(node.outputs[0])] = self._apply(node, values, neuron, biased)
        return values[id(self.output)]

    def _apply(self, node: gs.Node, values: Mapping[int, Array], neuron: int | None, biased: bool) -> Array:
        def read(index: int, tensor: gs.Tensor) -> Array:
            if not tensor.name:
                return np.empty(0)
            if id(tensor) in values:
                return values[id(tensor)]
            array = self._numbers(self._constants[id(tensor)], neuron)
            return np.zeros_like(array) if biased and (id(node), index) in self.bias_values else array

        if node.op in ALIASES or node.op in NORMS or node.op == "Transpose":
            return read(0, node.inputs[0])
        if node.op in _REDUCTIONS:
            source = producer(node.inputs[0])
            centred = source is not None and source.op in ("Pow", "Mul")
            return np.ones(()) if centred or node.op != "ReduceMean" else np.zeros(())
        function = POINTWISE[(node.domain or "", node.op)]
        return function([read(index, tensor) for index, tensor in enumerate(node.inputs)], node.attrs)

    def _numbers(self, folded: Folded, neuron: int | None) -> Array:
        """A constant as it stands in the equation: of the first expert, and of one neuron where only that is asked for."""
        array = folded.load().astype(np.float64)
        if folded.experts != 1:
            array = array[0]
        if array.size == self.width and self.width > 1:
            return array.reshape(-1) if neuron is None else array.reshape(-1)[neuron]
        return array.reshape(()) if array.size == 1 else array


class Walker:
    """Finds regions; remembers the values behind which nothing was found, so that each is visited once.

    Args:
        linears: the linear that computes a value, by identity of the value (with and without its bias).
    """

    def __init__(self, linears: Mapping[int, Linear]) -> None:
        self._linears = linears
        self._dead_ends: dict[int, Refusal] = {}

    def walk(self, down: Linear) -> Region | Refusal:
        """The region that feeds ``down``, or why there is none."""
        region = Region(down.input, down.d_in)
        constants: dict[int, Folded] = {}
        names: dict[int, str] = {}
        axes: dict[int, int] = {}
        order: list[gs.Node] = []
        seen: set[int] = set()
        pending: list[tuple[gs.Tensor, int, bool]] = [(down.input, down.axis, False)]
        while pending:
            tensor, axis, done = pending.pop()
            node = producer(tensor)
            if done:
                order.append(node)
                continue
            if id(tensor) in axes:
                continue
            axes[id(tensor)] = axis
            if self._leaf(tensor, axis, down.d_in, region):
                if len(region.leaves) > _MOST_LINEARS:  # a residual stream: there would be no end of them
                    return self._give_up(down, Refusal(tensor.name, "more linears than a block has meet", len(region.leaves)))
                continue
            folded = fold(tensor) or (picked(tensor) if down.gathered else None)  # else it is an embedding
            if folded is not None:
                constants[id(tensor)], names[id(tensor)] = folded, tensor.name
                continue
            refusal = self._dead_ends.get(id(tensor)) or self._refuse(tensor, node, axis, down.d_in)
            if refusal is None and len(seen) > _LARGEST:
                refusal = Refusal(tensor.name, "more operations than an activation has")
            if refusal is not None:
                self._dead_ends[id(tensor)] = refusal
                leaves = max(refusal.linear_leaves, len(region.leaves))
                return self._give_up(down, Refusal(refusal.value, refusal.reason, leaves))
            assert node is not None
            if id(node) in seen:
                continue
            seen.add(id(node))
            pending.append((tensor, axis, True))
            alias = node.op in ALIASES or node.op in NORMS
            for value in node.inputs[:1] if alias or node.op in _REDUCTIONS or node.op == "Transpose" else node.inputs:
                if value.name:
                    pending.append((value, turn_axis(node, axis), False))
        for key, folded in constants.items():
            if folded.size not in (0, 1, down.d_in) or not _along(folded, axes[key], down.d_in):
                return Refusal(names[key], "a constant that is not one number, or one for each neuron", len(region.leaves))
        region.steps = _sorted(order)
        region._constants = constants
        cutters: list[gs.Node] = [node for node in region.nodes if id(node) not in seen]
        region.nodes = [*cutters, *region.steps]
        region.inner_norm = any(node.op in NORMS or node.op in _REDUCTIONS for node in region.steps)
        self._find_biases(region, constants)
        return region

    def _give_up(self, down: Linear, refusal: Refusal) -> Refusal:
        """``refusal``, for every linear that reads what ``down`` reads."""
        self._dead_ends[id(down.input)] = refusal
        return refusal

    def _leaf(self, tensor: gs.Tensor, axis: int, width: int, region: Region) -> bool:
        linear = self._linears.get(id(tensor))
        if linear is not None and linear.axis == axis and linear.d_out == width:
            region.leaves.append(Leaf(tensor, linear))
            return True
        maker = producer(tensor)
        if maker is not None and maker.op in _PASS_ON:
            return False  # so that a value and a copy of it are one leaf
        cut = select(tensor, axis, width, self._linears)
        if cut is None:
            return False
        added = cut.constants()
        if added:
            region.biases[len(region.leaves)] = added
        region.leaves.append(Leaf(tensor, cut.linear, cut.columns, added))
        region.nodes += [node for node in cut.nodes if all(node is not other for other in region.nodes)]
        return True

    def _refuse(self, tensor: gs.Tensor, node: gs.Node | None, axis: int, width: int) -> Refusal | None:
        if id(tensor) in self._linears:
            linear = self._linears[id(tensor)]
            return Refusal(tensor.name, f"a linear of width {linear.d_out}, not {width}")
        if node is None:
            return Refusal(tensor.name, "reaches an input of the graph")
        key = (node.domain or "", node.op)
        if node.op in ALIASES and node.outputs[0] is tensor:
            return ALIASES[node.op](node, axis, width)
        if node.op == "Transpose":
            return None
        if node.op in NORMS or node.op in _REDUCTIONS:
            return None if _over_features(node, axis) else Refusal(tensor.name, f"{node.op} over other axes")
        if node.op == "BatchNormalization" and node.inputs[0].shape and axis != 1 - len(node.inputs[0].shape):
            return Refusal(tensor.name, "a BatchNormalization over another axis than the features'")
        if key in POINTWISE and len(node.outputs) == 1:
            return None
        return Refusal(tensor.name, f"{node.op} mixes tokens or is not known as pointwise")

    def _find_biases(self, region: Region, constants: Mapping[int, Folded]) -> None:
        starts = {id(leaf.tensor): number for number, leaf in enumerate(region.leaves)
                  if leaf.linear.fused_activation is None}
        for node in region.steps:
            if node.op in ALIASES or node.op == "Transpose":
                if node.inputs and id(node.inputs[0]) in starts and len(node.inputs[0].outputs) == 1:
                    starts[id(node.outputs[0])] = starts[id(node.inputs[0])]
                continue
            if node.op != "Add" and node.op not in CONTRIB_WITH_BIAS:
                continue
            for index, value in enumerate(node.inputs):
                other = node.inputs[1 - index] if len(node.inputs) == 2 else None
                if other is not None and id(value) in constants and id(other) in starts:
                    folded = constants[id(value)]
                    if folded.size == region.width and region.width > 1:
                        region.biases.setdefault(starts[id(other)], []).append(folded)
                        region.bias_values.add((id(node), index))


def _sorted(order: list[gs.Node]) -> list[gs.Node]:
    """``order`` (from a depth-first walk) with producers first."""
    inside = {id(node): node for node in order}
    result: list[gs.Node] = []
    state: dict[int, int] = {}
    for root in order:
        stack: list[tuple[gs.Node, bool]] = [(root, False)]
        while stack:
            node, done = stack.pop()
            if done:
                result.append(node)
            elif id(node) not in state:
                state[id(node)] = 1
                stack.append((node, True))
                for tensor in node.inputs:
                    source = producer(tensor)
                    if source is not None and id(source) in inside:
                        stack.append((source, False))
    return result


def _along(folded: Folded, axis: int, width: int) -> bool:
    """Whether a constant of ``width`` numbers has them on ``axis``: ``[width, 1]`` has one for each row."""
    return width == 1 or folded.size != width or (len(folded.shape) >= -axis and folded.shape[axis] == width)


def _over_features(node: gs.Node, axis: int) -> bool:
    axes: Any = node.attrs.get("axes")
    if node.op == "LpNormalization" or node.op in ("LayerNormalization", "SimplifiedLayerNormalization",
                                                   "RMSNormalization"):
        axes = [node.attrs.get("axis", -1)]
    elif axes is None and len(node.inputs) > 1:
        folded = fold(node.inputs[1])
        axes = None if folded is None else [int(a) for a in folded.load().reshape(-1)]
    if axes is None or len(axes) != 1:
        return False
    return axes[0] == axis or axes[0] >= 1  # a non-negative axis of a value of unknown rank is taken for the last
