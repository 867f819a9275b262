"""One view over LayerNorm and RMSNorm, as one operator or written out: ``y = x̂ ∘ γ + β`` with ``‖x̂‖₂ ≤ √d``."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from .broadcast import keeps_rank
from .constant import Folded, fold, integers, scalar
from .edit import producer

_SIMPLE = {"LayerNormalization": (1, 2, True), "SimplifiedLayerNormalization": (1, None, False),
           "RMSNormalization": (1, None, False)}
_SKIP = {"SkipLayerNormalization": (2, 3, True), "SkipSimplifiedLayerNormalization": (2, None, False)}


@dataclass(frozen=True)
class Slot:
    """Where a node reads something: ``node.inputs[index]``."""

    node: gs.Node
    index: int


@dataclass(eq=False)
class Norm:
    """A norm over the last axis.

    Attributes:
        input: x, ``[*, d]``; the first of two summands in a SkipLayerNormalization.
        output: ``x̂ ∘ γ + β``, ``[*, d]``.
        bare: x̂, where it is a value of its own (only where the norm is written out).
        centred: LayerNorm (x̂ ⊥ 1) rather than RMSNorm.
        scale, shift: γ ``[d]`` and β ``[d]`` (or one number for all); shift may be None.
        scale_at, shift_at: where they are read.
        nodes: its nodes, the last one last.
    """

    input: gs.Tensor
    output: gs.Tensor
    bare: gs.Tensor | None
    centred: bool
    scale: Folded
    shift: Folded | None
    scale_at: Slot
    shift_at: Slot | None
    nodes: list[gs.Node]

    @property
    def width(self) -> int:
        """d."""
        return self.scale.shape[-1]

    @property
    def written_out(self) -> bool:
        """Whether it is made of single operators."""
        return self.bare is not None


def read_norm(node: gs.Node) -> Norm | None:
    """The norm whose last node is ``node``, or None if it is none."""
    if node.domain in (None, "", "ai.onnx") and node.op in _SIMPLE and _over_last_axis(node):
        return _operator(node, *_SIMPLE[node.op])
    if node.domain == "com.microsoft" and node.op in _SKIP:
        return _operator(node, *_SKIP[node.op])
    if node.op == "Add" and not node.domain:
        scaled, shift, index = _parts(node)
        inner = producer(scaled) if scaled is not None else None
        norm = _written_out(inner) if inner is not None and inner.op == "Mul" else None
        if norm is None or shift is None or not _is_vector(shift, norm.width) or len(norm.output.outputs) != 1:
            return None
        if not keeps_rank(norm.input, shift.shape):
            return None
        return Norm(norm.input, node.outputs[0], norm.bare, norm.centred, norm.scale, shift, norm.scale_at, Slot(node, index),
                    [*norm.nodes, node])
    return _written_out(node) if node.op == "Mul" and not node.domain else None


def _over_last_axis(node: gs.Node) -> bool:
    axis = int(node.attrs.get("axis", -1))
    scale = fold(node.inputs[1])
    rank = len(node.inputs[0].shape) if node.inputs[0].shape else None
    return scale is not None and len(scale.shape) == 1 and (axis == -1 or (rank is not None and axis == rank - 1))


def _operator(node: gs.Node, scale_index: int, shift_index: int | None, centred: bool) -> Norm | None:
    scale = fold(node.inputs[scale_index])
    if scale is None or len(scale.shape) != 1:
        return None
    shift, shift_at = None, None
    if shift_index is not None and len(node.inputs) > shift_index and node.inputs[shift_index].name:
        shift, shift_at = fold(node.inputs[shift_index]), Slot(node, shift_index)
        if shift is None or shift.shape != scale.shape:
            return None
    return Norm(node.inputs[0], node.outputs[0], None, centred, scale, shift, Slot(node, scale_index), shift_at, [node])


def _written_out(node: gs.Node) -> Norm | None:
    """``γ ∘ n / √(mean n² + ε)`` ending in the product with γ, where n is x or x − mean x."""
    bare, scale, index = _parts(node)
    if bare is None or scale is None or not scale.shape or not _is_vector(scale, scale.shape[-1]):
        return None
    nodes = [node]
    inner = _through_cast(bare, nodes)
    divided = producer(inner)
    if divided is None or divided.domain not in (None, "", "ai.onnx") or divided.op not in ("Div", "Mul"):
        return None
    pairs = [divided.inputs] if divided.op == "Div" else [divided.inputs, list(divided.inputs)[::-1]]
    for numerator, other in pairs:
        found = [divided]
        squared = _root_mean_square(other, divided.op == "Mul", found)
        if squared is None or squared is not numerator:
            continue
        x, centred = _centred(numerator, found)
        if not keeps_rank(x, scale.shape):
            return None
        return Norm(x, node.outputs[0], bare, centred, scale, None, Slot(node, index), None,
                    [*reversed(found), *reversed(nodes)])
    return None


def _root_mean_square(tensor: gs.Tensor, reciprocal: bool, nodes: list[gs.Node]) -> gs.Tensor | None:
    """n, where ``tensor`` is √(mean n² + ε) over the last axis, or 1 / that."""
    node = producer(tensor)
    if node is None:
        return None
    nodes.append(node)
    if reciprocal:
        if node.op == "Pow" and scalar(node.inputs[1]) == -0.5:
            return _mean_square(node.inputs[0], nodes)
        if node.op == "Div" and scalar(node.inputs[0]) == 1:
            inner = node.inputs[1]
        elif node.op == "Reciprocal":
            inner = node.inputs[0]
        else:
            return None
        node = producer(inner)
        if node is None:
            return None
        nodes.append(node)
    if node.op == "Sqrt" or (node.op == "Pow" and scalar(node.inputs[1]) == 0.5):
        return _mean_square(node.inputs[0], nodes)
    return None


def _mean_square(tensor: gs.Tensor, nodes: list[gs.Node]) -> gs.Tensor | None:
    added = producer(tensor)
    if added is None or added.op != "Add":
        return None
    mean, epsilon, _ = _parts(added)
    averaged = producer(mean) if mean is not None else None
    if averaged is None or epsilon is None or len(added.inputs) != 2 or not _averages_last_axis(averaged):
        return None
    if any(dim != 1 for dim in epsilon.shape) or not float(epsilon.load().reshape(())) >= 0:
        return None
    square = producer(averaged.inputs[0])
    if square is None:
        return None
    nodes += [added, averaged, square]
    base = square.inputs[0]
    if square.op == "Pow" and scalar(square.inputs[1]) == 2:
        return base
    return base if square.op == "Mul" and square.inputs[1] is base else None


def _centred(n: gs.Tensor, nodes: list[gs.Node]) -> tuple[gs.Tensor, bool]:
    """x and True where ``n`` is x − mean x, else ``n`` and False."""
    node = producer(n)
    if node is not None and node.op == "Sub":
        averaged = producer(node.inputs[1])
        if averaged is not None and averaged.inputs[0] is node.inputs[0] and _averages_last_axis(averaged):
            nodes += [node, averaged]
            return node.inputs[0], True
    return n, False


def _averages_last_axis(node: gs.Node) -> bool:
    if node.op != "ReduceMean" or not node.attrs.get("keepdims", 1):
        return False
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    rank = len(node.inputs[0].shape) if node.inputs[0].shape else None
    return axes == [-1] or (rank is not None and axes == [rank - 1])


def _through_cast(tensor: gs.Tensor, nodes: list[gs.Node]) -> gs.Tensor:
    node = producer(tensor)
    if node is not None and node.op == "Cast":
        nodes.append(node)
        return node.inputs[0]
    return tensor


def _parts(node: gs.Node) -> tuple[gs.Tensor | None, Folded | None, int]:
    """The computed operand of a binary node, the constant one, and where the constant is."""
    left, right = fold(node.inputs[0]), fold(node.inputs[1])
    if (left is None) == (right is None):
        return None, None, 0
    return (node.inputs[1], left, 0) if left is not None else (node.inputs[0], right, 1)


def _is_vector(constant: Folded, width: int) -> bool:
    return constant.shape[-1:] == (width,) and all(dim == 1 for dim in constant.shape[:-1])
