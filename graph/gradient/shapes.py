"""Derivatives of what only moves numbers about: each goes back to where it came from."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from ..constant import fold
from .tape import Gradients, NoDerivativeError, Rule, Tape


def _reshaped(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    assert g[0] is not None
    return [t.like(g[0], node.inputs[0]), *[None] * (len(node.inputs) - 1)]


def _expand(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    assert g[0] is not None
    return [t.sum_to(g[0], node.inputs[0]), None]


def _transpose(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    assert g[0] is not None
    perm = node.attrs.get("perm")
    if perm is None:
        return [t.op("Transpose", g[0])]
    return [t.op("Transpose", g[0], perm=[list(perm).index(axis) for axis in range(len(perm))])]


def _concat(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    assert g[0] is not None
    axis = node.attrs["axis"]
    sizes = [t.op("Gather", t.shape(x), t.integers(axis), axis=0) for x in node.inputs]
    parts = t.split(g[0], t.op("Concat", *sizes, axis=0), axis, len(node.inputs))
    return [part if want else None for part, want in zip(parts, wanted, strict=True)]


def _split(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    parts = [t.zeros(value) if part is None else part for part, value in zip(g, node.outputs, strict=True)]
    return [t.op("Concat", *parts, axis=node.attrs.get("axis", 0)), *[None] * (len(node.inputs) - 1)]


def _slice(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """Along one axis: the places that were taken are what the same Slice takes of 0, 1, 2, …"""
    assert g[0] is not None
    x, start, end, *rest = node.inputs
    axes = fold(rest[0]) if rest and rest[0].name else fold(start)
    if axes is None or axes.size != 1:
        raise NoDerivativeError
    axis = int(axes.load().reshape(-1)[0]) if rest and rest[0].name else 0
    bounds = [t.op("Cast", bound, to=onnx.TensorProto.INT64) for bound in (start, end, *rest[1:])]
    places = t.op("Slice", _numbered(t, x, axis), *bounds[:2], t.integers(0), *bounds[2:])
    return [t.scatter(g[0], places, x, axis, repeated=False), *[None] * (len(node.inputs) - 1)]


def _gather(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """Of one place or a list of places."""
    assert g[0] is not None
    x, chosen = node.inputs
    axis, known = node.attrs.get("axis", 0), fold(chosen)
    if wanted[1] or known is None or len(known.shape) > 1:
        raise NoDerivativeError
    places = t.op("Gather", _numbered(t, x, axis), t.op("Reshape", chosen, t.integers(-1)), axis=0)
    found = g[0] if known.shape else t.op("Unsqueeze", g[0], t.integers(axis))
    return [t.scatter(found, places, x, axis, repeated=known.size > 1), None]


def _numbered(t: Tape, x: gs.Tensor, axis: int) -> gs.Tensor:
    """0, 1, 2, … as long as ``x`` is along ``axis``."""
    return t.op("Range", t.integer(0), t.op("Gather", t.shape(x), t.integer(axis), axis=0), t.integer(1))


RULES: dict[str, Rule] = {"Reshape": _reshaped, "Flatten": _reshaped, "Squeeze": _reshaped, "Unsqueeze": _reshaped,
                          "Expand": _expand, "Transpose": _transpose, "Concat": _concat, "Split": _split, "Slice": _slice,
                          "Gather": _gather}
MANY = ("Split",)
"""Those that take a gradient of any of their outputs."""
