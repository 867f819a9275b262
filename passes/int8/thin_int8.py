"""Two thin matrices in the place of one, both stored as int8: what split-ffn makes of the neurons that matter less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.builder import Builder
from ...graph.edit import producer
from ...graph.linear import Linear, read_linear
from ...graph.model import Model
from .dynamic_int8 import quantize_group
from .integer_weight import integer_weight
from .linear_groups import LinearGroup, is_matrix, merged
from .weight_codes import Rounding
from .weight_only_int8 import StoredWeight, dequantize_matrix, dequantize_stored, stored_weight

Array = npt.NDArray[Any]
Storage = Literal["weight-only", "dynamic", "float"]
_ROUNDING = Rounding()


def add_thin(build: Builder, x: gs.Tensor, factors: tuple[Array, Array], bias: Array | None, axis: int,
             hint: str) -> tuple[gs.Tensor, list[gs.Node]]:
    """``(x U) V + b``, and the nodes that multiply."""
    middle = build.linear(x, factors[0], None, axis=axis, hint=f"{hint}_thin")
    result = build.linear(middle, factors[1], bias, axis=axis, hint=f"{hint}_out")
    last = producer(result)
    product = last if last is None or last.op != "Add" else producer(last.inputs[0])
    return result, [node for node in (producer(middle), product) if node is not None]


def store(model: Model, block: FFNBlock, nodes: Sequence[gs.Node], storage: Storage) -> None:
    """Turn the weights of ``nodes`` into int8; products in integers (``dynamic``) where they are no convolutions."""
    if storage == "float":
        return
    linears = [linear for linear in map(read_linear, nodes) if linear is not None]
    if storage == "dynamic" and model.opset >= 11 and all(is_matrix(linear) for linear in linears):
        groups = [LinearGroup(block.name, block.path, block.graph, [linear], block) for linear in linears]
        for group in merged(groups):
            weights = [integer_weight(linear, _ROUNDING, {}) for linear in group.linears]
            quantize_group(model, group, [weight for weight in weights if weight is not None], rows=True)
        return
    for linear in linears:
        _store(Builder(model, block.graph, block.name, linear.onnx_type), linear)


def _store(build: Builder, linear: Linear) -> None:
    if is_matrix(linear):
        weight = integer_weight(linear, _ROUNDING, {})
        if weight is not None:
            dequantize_matrix(build, linear, weight)
        return
    stored = stored_weight(linear, _ROUNDING.largest)
    if isinstance(stored, StoredWeight):
        dequantize_stored(build, linear, stored, _ROUNDING.largest)
