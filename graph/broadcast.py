"""What can surely be told of a value's shape, so that a constant taken away from it does not change that shape.

A constant of shape [1, 1, d] added to a value of two axes gives one of three, and [d] added to [n, 1] gives [n, d]: where the
addition goes elsewhere, so does the shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from .constant import fold
from .edit import producer

_STEPS = 12
_DOMAINS = (None, "", "ai.onnx", "com.microsoft")
_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "PRelu", "BiasGelu", "FastGelu", "BiasAdd"})
_ALIKE = frozenset({
    "Abs", "Cast", "CastLike", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish", "Neg", "QuickGelu", "Reciprocal", "Relu", "RMSNormalization",
    "Selu", "Sigmoid", "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax",
    "Softplus", "Sqrt", "Tanh"})
"""Operators whose first output has the shape of their first input."""
_PRODUCTS = ("MatMul", "FusedMatMul")
_MATRIX = {"MatMul": 0, "FusedMatMul": "transB", "Gemm": "transB", "FusedGemm": "transB"}


def rank(tensor: gs.Tensor, steps: int = _STEPS) -> int | None:
    """How many axes ``tensor`` has, where the graph or the operators before it say so."""
    known, node = _stated(tensor), _maker(tensor)
    if known is not None or node is None or steps == 0:
        return known
    if node.op in _BINARY or node.op in _PRODUCTS:
        ranks = [rank(each, steps - 1) for each in _operands(node)]
        if None in ranks or (len(ranks) > 1 and node.op in _PRODUCTS and 1 in ranks):
            return None
        return max(each for each in ranks if each is not None)
    return rank(node.inputs[0], steps - 1) if node.op in _ALIKE else None


def has_rank(tensor: gs.Tensor, axes: int, steps: int = _STEPS) -> bool:
    """Whether ``tensor`` surely has ``axes`` axes or more."""
    known, node = _stated(tensor), _maker(tensor)
    if known is not None or node is None or steps == 0:
        return known is not None and known >= axes
    if node.op in _PRODUCTS:
        return all(has_rank(each, axes, steps - 1) for each in _operands(node))
    if node.op in _BINARY:
        return any(has_rank(each, axes, steps - 1) for each in node.inputs if each.name)
    return node.op in _ALIKE and has_rank(node.inputs[0], axes, steps - 1)


def _stated(tensor: gs.Tensor) -> int | None:
    """The axes of ``tensor``, told from itself or from its operator alone."""
    if tensor.shape is not None:
        return len(tensor.shape)
    folded, node = fold(tensor), _maker(tensor)
    if folded is not None:
        return len(folded.shape)
    if node is None:
        return None
    if node.op == "Transpose" and node.attrs.get("perm"):
        return len(node.attrs["perm"])
    if node.op in ("Gemm", "FusedGemm", "Flatten"):
        return 2
    return _count(node.inputs[1]) if node.op == "Reshape" and len(node.inputs) > 1 else None


def _maker(tensor: gs.Tensor) -> gs.Node | None:
    """The node whose first output ``tensor`` is, of an operator set that is known."""
    node = producer(tensor)
    if node is None or not node.inputs or node.outputs[0] is not tensor or node.domain not in _DOMAINS:
        return None
    return node


def _operands(node: gs.Node) -> list[gs.Tensor]:
    """What ``node`` has its axes from: not the matrix that a value is multiplied by."""
    if node.op in _PRODUCTS and (weight := fold(node.inputs[1])) is not None and len(weight.shape) == 2:
        return [node.inputs[0]]
    return [each for each in node.inputs if each.name]


def _count(shape: gs.Tensor) -> int | None:
    """How many sizes the target of a Reshape has."""
    known = shape.shape
    if known is None or len(known) != 1 or not isinstance(known[0], int):
        folded, node = fold(shape), producer(shape)
        if folded is not None:
            known = folded.shape
        elif node is not None and node.op == "Concat" and not node.domain:
            parts = [_count(each) for each in node.inputs]
            return None if None in parts else sum(part for part in parts if part is not None)
        elif node is not None and node.op == "Unsqueeze":
            return 1  # of a number, else the target would have two axes
        elif node is not None and node.op == "Gather" and (index := fold(node.inputs[1])) is not None:
            known = index.shape
    return int(known[0]) if known is not None and len(known) == 1 and isinstance(known[0], int) else None


def features(tensor: gs.Tensor, steps: int = _STEPS) -> int | None:
    """The last dimension of ``tensor``, where the graph or the operators before it say so."""
    if tensor.shape is not None:
        last = tensor.shape[-1] if len(tensor.shape) else None
        if isinstance(last, int) and last >= 0:
            return int(last)
    folded, node = fold(tensor), _maker(tensor)
    if folded is not None:
        return folded.shape[-1] if folded.shape else None
    if node is None or steps == 0:
        return None
    if node.op in _MATRIX and len(node.inputs) > 1:
        weight, turned = fold(node.inputs[1]), _MATRIX[node.op]
        if weight is None or len(weight.shape) < 2:
            return None
        return weight.shape[-2 if turned and node.attrs.get(turned, 0) else -1]
    if node.op == "MatMulNBits":
        return int(node.attrs["N"])
    if node.op == "Reshape" and len(node.inputs) > 1:
        target = fold(node.inputs[1])
        last = int(target.load().reshape(-1)[-1]) if target is not None and 0 < target.size < 16 else 0
        return last if last > 0 else None
    if node.op in _BINARY:  # the result's is that of one of them, unless that is 1
        known = (features(each, steps - 1) for each in sorted(_operands(node), key=lambda each: fold(each) is None))
        return next((each for each in known if each is not None and each > 1), None)
    return features(node.inputs[0], steps - 1) if node.op in _ALIKE else None


def keeps_rank(x: gs.Tensor, shape: Sequence[int], total: gs.Tensor | None = None) -> bool:
    """Whether ``x`` (of one axis or more) surely has as many axes as ``total``, which is x with a constant of ``shape`` added."""
    stated = total.shape if total is not None else None
    return len(shape) <= 1 or (stated is not None and len(stated) > len(shape)) or has_rank(x, len(shape))
