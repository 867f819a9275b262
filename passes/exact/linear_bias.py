"""The bias of a linear: where it is, whether it can take something in, and what that costs in the file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.constant import fold
from ...graph.edit import set_input, set_inputs
from ...graph.linear import Linear
from ...graph.model import Model
from ...graph.types import numpy_type
from .sharing import is_read_elsewhere

Array = npt.NDArray[Any]


def bias_at(linear: Linear) -> tuple[gs.Node, int] | None:
    """Node and input that hold the bias, or None where there is none (or the node holds it in another way)."""
    last = linear.nodes[-1]
    if last.op == "Add" and last is not linear.node:
        return last, 0 if fold(last.inputs[0]) is not None else 1
    held = len(linear.node.inputs) > 2 and bool(linear.node.inputs[2].name)
    return (linear.node, 2) if held and linear.kind in ("Gemm", "FusedGemm") else None


def is_fixed(linear: Linear) -> bool:
    """Whether the bias, if there is one, is a constant that the caller cannot override."""
    place = bias_at(linear)
    if place is None:
        return linear.bias is None
    folded = fold(place[0].inputs[place[1]])
    return folded is not None and not folded.overridable


def takes_bias(linear: Linear, width: int) -> bool:
    """Whether something can be added to the bias of ``linear``, which reads ``width`` features, without another node."""
    if linear.quantized or linear.packed or linear.gathered or linear.axis != -1 or linear.overridable:
        return False
    if width not in (1, linear.d_in) or linear.kind not in ("MatMul", "Gemm", "FusedMatMul"):
        return False
    if linear.fused_activation is not None or not is_fixed(linear):
        return False
    return linear.bias is not None or linear.kind == "Gemm"


def add_to_bias(model: Model, graph: gs.Graph, linear: Linear, extra: Array) -> None:
    """``b ← b + extra`` in the bias of ``linear``, or in a new one of its Gemm. ``extra``: ``[d_out]``, float64."""
    build = Builder(model, graph, linear.node.name or "fold_bias", linear.onnx_type)
    total = extra if linear.bias is None else linear.bias().astype(np.float64) + extra
    last = linear.nodes[-1]
    if last.op == "Add" and last is not linear.node:
        index = 0 if fold(last.inputs[0]) is not None else 1
        leading = len(fold(last.inputs[index]).shape) - 1  # type: ignore[union-attr]
        set_input(last, index, build.constant(total.reshape(*[1] * leading, -1), "folded_bias"))
        return
    constant = build.constant(total, "folded_bias")
    if "beta" in linear.node.attrs:
        linear.node.attrs["beta"] = 1.0
    set_inputs(linear.node, [*linear.node.inputs[:2], constant])


def freed_bytes(node: gs.Node, index: int) -> int:
    """Bytes that nothing needs any more once ``node`` does not read its constant input ``index``."""
    folded = fold(node.inputs[index])
    if folded is None or folded.overridable or not folded.sources or is_read_elsewhere(node, index):
        return 0
    return int(folded.sources[0]._values.nbytes)


def bias_growth(linears: Iterable[Linear]) -> int:
    """By how many bytes the file grows where every one of ``linears`` gets a bias of its own."""
    more = 0
    for linear in linears:
        place = bias_at(linear)
        more += linear.d_out * numpy_type(linear.onnx_type).itemsize - (freed_bytes(*place) if place is not None else 0)
    return more
