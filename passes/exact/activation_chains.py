"""Activations as the operators that ONNX Runtime makes one kernel of, and what such operators compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.constant import fold
from ...graph.pointwise import POINTWISE, Array

Number = Callable[[float], gs.Constant]
Chain = Callable[[Builder, Number, gs.Tensor], gs.Tensor]
_NATIVE_GELU = 20  # the opset that has Gelu


def numbers(build: Builder, memo: dict[object, Any]) -> Number:
    """Gives scalar constants, each made once in a graph and plan."""

    def number(value: float) -> gs.Constant:
        key = ("number", id(build.graph), build.onnx_type, value)
        if key not in memo:
            memo[key] = build.number(value, "number")
        return memo[key]

    return number


def _gelu(build: Builder, number: Number, z: gs.Tensor) -> gs.Tensor:
    """z/2 · (1 + erf(z/√2))"""
    if build.model.opset >= _NATIVE_GELU:
        return build.op("Gelu", z)
    error = build.op("Add", build.op("Erf", build.op("Div", z, number(math.sqrt(2)))), number(1))
    return build.op("Mul", build.op("Mul", z, error), number(0.5))


def _gelu_tanh(build: Builder, number: Number, z: gs.Tensor) -> gs.Tensor:
    """z/2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))"""
    if build.model.opset >= _NATIVE_GELU:
        return build.op("Gelu", z, approximate="tanh")
    cube = build.op("Mul", build.op("Pow", z, number(3)), number(0.044715))
    inner = build.op("Tanh", build.op("Mul", build.op("Add", z, cube), number(math.sqrt(2 / math.pi))))
    return build.op("Mul", build.op("Mul", z, number(0.5)), build.op("Add", inner, number(1)))


def _silu(build: Builder, number: Number, z: gs.Tensor) -> gs.Tensor:
    return build.op("Mul", z, build.op("Sigmoid", z))


def _quick_gelu(build: Builder, number: Number, z: gs.Tensor) -> gs.Tensor:
    return build.op("Mul", z, build.op("Sigmoid", build.op("Mul", z, number(1.702))))


def _relu2(build: Builder, number: Number, z: gs.Tensor) -> gs.Tensor:
    positive = build.op("Relu", z)
    return build.op("Mul", positive, positive)


def _mish(build: Builder, number: Number, z: gs.Tensor) -> gs.Tensor:
    return build.op("Mul", z, build.op("Tanh", build.op("Softplus", z)))


def _one(op: str) -> Chain:
    return lambda build, number, z: build.op(op, z)


CHAINS: Mapping[str, Chain] = {
    "relu": _one("Relu"), "relu2": _relu2, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "quick_gelu": _quick_gelu, "silu": _silu,
    "sigmoid": _one("Sigmoid"), "tanh": _one("Tanh"), "softplus": _one("Softplus"), "mish": _mish,
}
"""By name. What is not here (a slope or an alpha of its own, ``custom``) keeps the nodes it has."""


def compute(nodes: Sequence[gs.Node], values: Mapping[int, Array], result: gs.Tensor) -> Array:
    """What ``nodes`` (pointwise, producers first) make of ``values`` (by identity of the tensor), in float64."""
    known = dict(values)

    def read(tensor: gs.Tensor) -> Array:
        if id(tensor) not in known:
            folded = fold(tensor)
            assert folded is not None
            known[id(tensor)] = folded.load().astype(np.float64)
        return known[id(tensor)]

    with np.errstate(all="ignore"):
        for node in nodes:
            function = POINTWISE[(node.domain or "", node.op)]
            known[id(node.outputs[0])] = function([read(tensor) for tensor in node.inputs], node.attrs)
    return known[id(result)]
