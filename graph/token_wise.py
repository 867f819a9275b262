"""Operators that treat each token by itself: what they give for a token depends on that token and on constants alone.

    [batch, tokens, d] or [batch · tokens, d]  ──►  the same operator on any choice of the rows  ──►  those rows of its output

The table goes by operators and attributes; which values hold a row for each token is measured by whoever asks, as exporters leave
shapes unsaid.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import onnx_graphsurgeon as gs

from .constant import integers
from .edit import consumers
from .linear import MICROSOFT
from .pointwise import POINTWISE


class Kind(Enum):
    """What a value holds, seen from its tokens."""

    TOKENS = "a row [d] for each token: [batch, tokens, d]"
    FLAT = "a row [d] for each token: [batch · tokens, d]"
    SAME = "the same for all tokens: broadcasts against the last axis alone"
    MATRIX = "two dimensions, neither of them tokens"
    OTHER = "anything else"


_DOMAINS = ("", "ai.onnx", MICROSOFT)
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "Gemm",
                       "FusedGemm"})
_PACKED_PRODUCTS = frozenset({"MatMulNBits"})
_PLAIN = frozenset({"Cast", "CastLike", "Identity", "Dropout", "DynamicQuantizeLinear", "SkipLayerNormalization",
                    "SkipSimplifiedLayerNormalization"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
_AXIS = {"Softmax": -1, "LogSoftmax": -1, "LpNormalization": -1, "Split": 0, "Concat": 0}  # its default, of opset 13 or later
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"})
ROWS = frozenset({Kind.TOKENS, Kind.FLAT})
"""The kinds of values with a row for each token."""


def is_product(node: gs.Node) -> bool:
    """Whether ``node``, known to be token-wise, multiplies by a matrix."""
    return node.op in _PRODUCTS or node.op in _PACKED_PRODUCTS


def is_token_wise(node: gs.Node, kind: Callable[[gs.Tensor], Kind], opset: int) -> bool:
    """Whether ``node`` gives the same for a token whatever the other tokens are, and whether they are there.

    Args:
        kind: of a value.
    """
    if (node.domain or "") not in _DOMAINS:
        return False
    given = [kind(tensor) for tensor in node.inputs if tensor.name or isinstance(tensor, gs.Constant)]
    made = [kind(tensor) for tensor in node.outputs if tensor.name and (consumers(tensor) or tensor is node.outputs[0])]
    rows = ROWS & set(given)
    if not rows or not ROWS & set(made) or not set(made) <= {*ROWS, Kind.SAME}:
        return False
    if node.op == "Reshape":
        return given[0] in ROWS
    if len(rows) > 1 or not set(made) <= {*rows, Kind.SAME}:
        return False
    if node.op in _PACKED_PRODUCTS:
        return given[0] in ROWS and not ROWS & set(given[1:])
    if node.op in _PRODUCTS:
        return (given[0] in ROWS and given[1] is Kind.MATRIX and set(given[2:]) <= {Kind.SAME}
                and not any(node.attrs.get(each, 0) for each in ("transA", "transBatchA", "transBatchB")))
    return set(given) <= {*rows, Kind.SAME} and _acts_on_last(node, kind, opset, (-1, 1 if Kind.FLAT in rows else 2))


def _acts_on_last(node: gs.Node, kind: Callable[[gs.Tensor], Kind], opset: int, last: tuple[int, int]) -> bool:
    """Whether a node all of whose inputs are rows or the same for all of them mixes nothing but features."""
    op = node.op
    if op in _PLAIN:
        return True
    if op in _NORMS:
        return int(node.attrs.get("axis", -1)) in last
    if op in _AXIS:
        default = _AXIS[op] if opset >= 13 or op in ("Split", "Concat", "LpNormalization") else 1
        return int(node.attrs.get("axis", default)) in last
    if op in _REDUCTIONS:
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
        return axes is not None and len(axes) == 1 and int(axes[0]) in last and bool(node.attrs.get("keepdims", 1))
    if op in ("QuantizeLinear", "DequantizeLinear"):
        return _is_one_number(node.inputs[1]) or int(node.attrs.get("axis", 1)) in last
    if op == "Slice":
        axes = integers(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3].name else node.attrs.get("axes")
        return bool(axes) and all(int(axis) in last for axis in axes or ())
    if op == "Gather":
        return int(node.attrs.get("axis", 0)) in last and kind(node.inputs[0]) in ROWS
    return op != "BatchNormalization" and (node.domain or "", op) in POINTWISE


def _is_one_number(tensor: gs.Tensor) -> bool:
    shape = tensor.shape
    return shape is not None and all(dim == 1 for dim in shape)
