"""Derivatives of means, sums, norms and softmax.

    softmax            y (g − Σ g y)
    log softmax        g − eʸ Σ g
    LayerNorm          x̂ = (x − μ) r, r = 1/√(var + ε), ĝ = g γ:   r (ĝ − mean ĝ − x̂ mean(ĝ x̂))
    RMSNorm            x̂ = x r, r = 1/√(mean x² + ε):              r (ĝ − x̂ mean(ĝ x̂))
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..constant import fold
from .tape import Gradients, NoDerivativeError, Rule, Tape


def _softmax(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    assert g[0] is not None
    y, axis = node.outputs[0], node.attrs.get("axis", -1)
    if node.op == "LogSoftmax":
        total = t.op("ReduceSum", g[0], t.integers(axis), keepdims=1)
        return [t.op("Sub", g[0], t.op("Mul", t.op("Exp", y), total))]
    weighed = t.op("Mul", g[0], y)
    return [t.op("Sub", weighed, t.op("Mul", y, t.op("ReduceSum", weighed, t.integers(axis), keepdims=1)))]


def _norm(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    assert g[0] is not None
    x, scale = node.inputs[:2]
    beside = any(tensor.name and tensor.outputs for tensor in node.outputs[1:])  # the mean or the spread, which is read
    axis, known = node.attrs.get("axis", -1), fold(scale)
    last = axis == -1 or (axis > 0 and known is not None and len(known.shape) == 1)
    if not last or beside:
        raise NoDerivativeError
    centred = node.op == "LayerNormalization"
    about = t.op("Sub", x, t.mean(x)) if centred else x
    spread = t.op("Add", t.mean(t.op("Mul", about, about)), t.number(node.attrs.get("epsilon", 1e-5)))
    r = t.op("Reciprocal", t.op("Sqrt", spread))
    unit = t.op("Mul", about, r)
    found: Gradients = [None] * len(node.inputs)
    if wanted[0]:
        scaled = t.op("Mul", g[0], scale)
        rest = t.op("Sub", scaled, t.mean(scaled)) if centred else scaled
        found[0] = t.op("Mul", r, t.op("Sub", rest, t.op("Mul", unit, t.mean(t.op("Mul", scaled, unit)))))
    if wanted[1]:
        found[1] = t.sum_to(t.op("Mul", g[0], unit), scale)
    if len(node.inputs) > 2 and wanted[2]:
        found[2] = t.sum_to(g[0], node.inputs[2])
    return found


def _reduced(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """ReduceSum, ReduceMean, ReduceL2: spread over what was added up."""
    assert g[0] is not None
    x, y, found = node.inputs[0], node.outputs[0], g[0]
    given = node.inputs[1] if len(node.inputs) > 1 and node.inputs[1].name else None
    if given is None and node.attrs.get("axes") is not None:
        given = t.integers(*node.attrs["axes"])
    if given is None and node.attrs.get("noop_with_empty_axes", 0):
        raise NoDerivativeError
    if not node.attrs.get("keepdims", 1) and given is not None:
        found, y = t.op("Unsqueeze", found, given), t.op("Unsqueeze", y, given)
    if node.op == "ReduceL2":
        found = t.op("Div", t.op("Mul", found, x), t.op("Max", y, t.number(1e-30)))
    else:
        found = t.op("Expand", found, t.shape(x))
    if node.op == "ReduceMean":
        part = [t.op("Cast", t.op("Size", value), to=1) for value in (y, x)]
        found = t.op("Mul", found, t.op("Div", *part))
    return [found, *[None] * (len(node.inputs) - 1)]


RULES: dict[str, Rule] = {"Softmax": _softmax, "LogSoftmax": _softmax, "LayerNormalization": _norm,
                          "RMSNormalization": _norm, "SimplifiedLayerNormalization": _norm,
                          "ReduceSum": _reduced, "ReduceMean": _reduced, "ReduceL2": _reduced}
