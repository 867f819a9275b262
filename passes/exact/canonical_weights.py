"""Weights in the layout of the canonical form, so that nothing is untied and the file does not grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.constant import Folded, fold
from ...graph.edit import consumers, producer
from ...graph.linear import Linear
from ...graph.weights import ComputedValues, nbytes_of
from .sharing import is_free

Array = npt.NDArray[Any]
Order = npt.NDArray[np.int64] | None


class CanonicalWeights:
    """Gives each linear the initializer that its canonical form reads.

    A stored weight is written anew only where everything that reads it is re-emitted too, in one way, so that one new
    initializer takes the place of one old one; otherwise linears keep what they read.

    Args:
        linears: those of all blocks that are re-emitted.
        memo: where weights made are remembered.
        anew: write every weight anew that may be, also where it lies as wanted already.
    """

    def __init__(self, linears: Iterable[Linear], memo: dict[object, Any], anew: bool) -> None:
        self._memo, self._anew = memo, anew
        self._groups: dict[int, list[Linear]] = {}
        for linear in linears:
            if linear.source is not None:
                self._groups.setdefault(id(linear.source), []).append(linear)
        self._owned = {source: _is_owned(group) for source, group in self._groups.items()}

    def may_write(self, linear: Linear) -> bool:
        """Whether a new initializer can take the place of the stored weight of ``linear``."""
        return linear.source is not None and self._owned.get(id(linear.source), False)

    def matrix(self, build: Builder, linear: Linear, order: Order = None) -> gs.Tensor | None:
        """The weight as the node of its kind reads it, untransposed; None where only the stored one can be read.

        Args:
            order: take the output columns in this order.
        """
        stored = weight_tensor(linear)
        if order is None and is_in_place(linear) and not (self._anew and self.may_write(linear)):
            return stored
        if not self.may_write(linear):
            return None
        key = ("canonical weight", linear.weight_key, b"" if order is None else order.tobytes())
        if key not in self._memo:
            constant = build.constant(_values(linear, order), f"{_hint(linear)}_weight")
            constant.home = getattr(linear.source, "home", None) or build.graph
            self._memo[key] = constant
        return self._memo[key]


def is_in_place(linear: Linear) -> bool:
    """Whether the stored weight lies as the canonical node reads it: an initializer, not transposed, not scaled."""
    node = linear.node
    if any(node.attrs.get(key, 0) for key in ("transA", "transB")) or float(node.attrs.get("alpha", 1.0)) != 1.0:
        return False
    if linear.kind == "Einsum" and not is_packed_einsum(linear):
        return False
    tensor = weight_tensor(linear)
    return isinstance(tensor, gs.Constant) or getattr(tensor, "default", None) is not None


def weight_tensor(linear: Linear) -> gs.Tensor:
    """The value that stands for the stored weight: what the node reads or, of packed experts, what they are picked from."""
    picking = picking_nodes(linear)
    return picking[0].inputs[0] if picking else linear.node.inputs[_index(linear)]


def picking_nodes(linear: Linear) -> list[gs.Node]:
    """The Gather that picks matrices of packed experts at run time and what lies between it and the product; else none."""
    found: list[gs.Node] = []
    node = producer(linear.node.inputs[_index(linear)]) if linear.gathered else None
    while node is not None:
        found.insert(0, node)
        node = producer(node.inputs[0]) if node.op not in ("Gather", "GatherND") else None
    return found


def is_turned(linear: Linear) -> bool:
    """Whether the node computes ``W x``, the weight first."""
    return linear.kind == "MatMul" and linear.axis == -2


def is_packed_einsum(linear: Linear) -> bool:
    """Whether one Einsum multiplies by the matrices of all experts, and lays out the results as it likes."""
    return linear.kind == "Einsum" and linear.packed


def _index(linear: Linear) -> int:
    return 0 if is_turned(linear) else 1


def _values(linear: Linear, order: Order) -> ComputedValues:
    load, shape = linear.weight, _folded(linear).shape
    transposes = sum(node.op == "Transpose" for node in picking_nodes(linear))
    swapped = (is_turned(linear) + transposes) % 2 == 1 or linear.kind in ("Conv", "FusedConv")
    if not linear.gathered and linear.kind not in ("Conv", "FusedConv"):
        sizes = (linear.d_in, linear.d_out)
        shape = (*shape[:-2], *(sizes[::-1] if swapped else sizes))

    def compute() -> Array:
        matrix = load() if order is None else load()[..., order]
        turned: Array = matrix.swapaxes(-1, -2) if swapped else matrix
        return turned.reshape(shape)

    return ComputedValues(shape, linear.onnx_type, compute)


def _folded(linear: Linear) -> Folded:
    folded = fold(weight_tensor(linear))
    assert folded is not None
    return folded


def _is_owned(group: list[Linear]) -> bool:
    """Whether the linears of ``group`` alone read the weight they share, all in the same way, and it may be replaced."""
    first = group[0]
    if (first.gathered and first.kind != "MatMul") or is_packed_einsum(first):
        return False
    if first.source is None or first.overridable or first.quantized:
        return False
    if any(linear.weight_key != first.weight_key or linear.weight_key is None for linear in group):
        return False
    allowed: set[int] = set()
    values: list[gs.Tensor] = []
    for linear in group:
        folded = fold(weight_tensor(linear))
        if folded is None or not all(is_free(source) for source in folded.sources):
            return False
        values += folded.sources
        picked = picking_nodes(linear)
        allowed |= {id(node) for node in (*folded.nodes, *picked, linear.node)}
        values += [node.outputs[0] for node in (*folded.nodes, *picked)]
    if any(id(reader) not in allowed for value in values for reader in consumers(value)):
        return False
    sources = {id(source): source for source in _folded(first).sources}
    new = nbytes_of(_folded(first).shape, first.onnx_type)
    return new <= sum(source._values.nbytes for source in sources.values())


def _hint(linear: Linear) -> str:
    return linear.node.name.rsplit("/", 1)[-1] or linear.kind
