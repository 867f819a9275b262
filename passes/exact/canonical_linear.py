"""A linear in its canonical form: MatMul and Add; a Gemm where its rows are two-dimensional anyway; a Conv where it is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.constant import fold
from ...graph.edit import is_output, producer, remove_dead, take_over
from ...graph.linear import Linear
from .canonical_weights import CanonicalWeights, Order, is_in_place, is_packed_einsum, is_turned, picking_nodes

_GEMM = ("Gemm", "FusedGemm")
_CONV = ("Conv", "FusedConv")
_PLAIN = ("MatMul", "FusedMatMul", "Einsum")


def is_canonical(linear: Linear) -> bool:
    """Whether ``linear`` is in its canonical form already."""
    node = linear.node
    if not is_in_place(linear) or (linear.kind not in ("MatMul", *_GEMM, *_CONV) and not is_packed_einsum(linear)):
        return False
    return linear.kind not in _GEMM or (float(node.attrs.get("beta", 1.0)) == 1.0 and linear.nodes[-1] is node)


def reason_against(graph: gs.Graph, linear: Linear) -> str | None:
    """Why ``linear`` cannot be re-emitted; None where it can."""
    if linear.quantized:
        return "its weights are stored as integers"
    if linear.kind not in (*_PLAIN, *_GEMM, *_CONV):
        return f"a {linear.kind} is not re-emitted"
    if _overridable_bias(linear):
        return "a bias is scaled, and an input that the caller may override"
    if any(is_output(graph, tensor) for node in linear.nodes for tensor in node.outputs if tensor is not linear.output):
        return "a value inside one of its linears is an output"
    return None


def reemit(build: Builder, linear: Linear, weights: CanonicalWeights) -> bool:
    """Put the canonical form of ``linear`` in its place. False where its weight must stay as it is, and the node with it."""
    weight = weights.matrix(build, linear)
    if weight is None:
        return False
    y = product(build, linear, linear.input, weight)
    old = producer(linear.output)
    take_over(linear.output, y)
    remove_dead(build.graph, [old] if old is not None else [])
    return True


def repeat(build: Builder, linear: Linear) -> None:
    """Put a copy of its nodes in the place of ``linear``: its weight must stay as it is stored."""
    y = copy_nodes(build, linear.nodes, {})[id(linear.output)]
    old = producer(linear.output)
    take_over(linear.output, y)
    remove_dead(build.graph, [old] if old is not None else [])


def product(build: Builder, linear: Linear, x: gs.Tensor, weight: gs.Tensor, order: Order = None) -> gs.Tensor:
    """``x W + b`` in the canonical form of ``linear``'s kind."""
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
    if linear.kind in (*_GEMM, *_CONV):
        attrs = {key: value for key, value in linear.node.attrs.items() if key not in ("transA", "transB", "alpha", "beta")}
        bias = bias_tensor(build, linear, order)
        return build.op(linear.kind, x, weight, *([] if bias is None else [bias]), hint=hint, domain=linear.node.domain or "",
                        **attrs)
    picking = picking_nodes(linear)
    if picking:
        weight = copy_nodes(build, picking, {id(picking[0].inputs[0]): weight})[id(picking[-1].outputs[0])]
    if is_packed_einsum(linear):
        y: gs.Tensor = build.op("Einsum", x, weight, hint=hint, **linear.node.attrs)
    else:
        y = build.op("MatMul", *((weight, x) if is_turned(linear) else (x, weight)), hint=hint)
    bias = bias_tensor(build, linear, order)
    return y if bias is None else build.op("Add", y, bias, hint=f"{hint}_add")


def bias_tensor(build: Builder, linear: Linear, order: Order = None) -> gs.Tensor | None:
    """The stored bias where it can be read as it is, else a new initializer; None where there is none."""
    if linear.bias is None:
        return None
    last = linear.nodes[-1]
    if last.op == "Add" and last is not linear.node:
        stored = next(tensor for tensor in last.inputs if fold(tensor) is not None)
    else:
        stored = last.inputs[2]
    folded = fold(stored)
    assert folded is not None
    too_deep = linear.kind in _GEMM and len(folded.shape) > 2
    if order is None and float(linear.node.attrs.get("beta", 1.0)) == 1.0 and not too_deep:
        return stored
    values = linear.bias()
    return build.constant(values if order is None else values[order], f"{linear.node.name.rsplit('/', 1)[-1]}_bias")


def _overridable_bias(linear: Linear) -> bool:
    """Whether the caller may override the bias and more is done with it than reading it."""
    if linear.bias is None or linear.kind not in _GEMM or float(linear.node.attrs.get("beta", 1.0)) == 1.0:
        return False
    folded = fold(linear.node.inputs[2])
    return folded is not None and folded.overridable


def copy_nodes(build: Builder, nodes: Sequence[gs.Node], values: Mapping[int, gs.Tensor]) -> dict[int, gs.Tensor]:
    """New nodes like ``nodes`` (producers first) in the builder's graph, which read ``values`` (by identity of the old).

    Returns:
        The new value for each old one, by identity.
    """
    new: dict[int, Any] = dict(values)
    for node in nodes:
        inputs = [new.get(id(tensor), tensor) for tensor in node.inputs]
        outputs = [build.value(f"{node.op}_output") if tensor.name else gs.Variable.empty() for tensor in node.outputs]
        copy = build.nodes(node.op, inputs, outputs, domain=node.domain or "", **node.attrs)
        assert len(copy.outputs) == len(node.outputs)
        new.update({id(old): made for old, made in zip(node.outputs, outputs, strict=True)})
    return new
