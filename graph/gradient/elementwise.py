"""Derivatives of what is computed number by number: g is what reaches the output, y the output itself."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from ..constant import fold
from .tape import Gradients, NoDerivativeError, Rule, Tape


def _first(g: Gradients) -> gs.Tensor:
    assert g[0] is not None
    return g[0]


def _each(t: Tape, node: gs.Node, found: list[gs.Tensor | None], wanted: list[bool]) -> Gradients:
    """What belongs to each input, added up where that was broadcast."""
    return [t.sum_to(one, x) if want and one is not None else None
            for one, x, want in zip(found, node.inputs, wanted, strict=True)]


def _add(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    return _each(t, node, [g[0]] * len(node.inputs), wanted)


def _sub(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    return _each(t, node, [g[0], t.op("Neg", _first(g)) if wanted[1] else None], wanted)


def _mul(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    a, b = node.inputs
    return _each(t, node, [t.op("Mul", _first(g), b) if wanted[0] else None,
                           t.op("Mul", _first(g), a) if wanted[1] else None], wanted)


def _div(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """a / b: g / b and −g y / b."""
    over = t.op("Div", _first(g), node.inputs[1])
    return _each(t, node, [over, t.op("Neg", t.op("Mul", over, node.outputs[0])) if wanted[1] else None], wanted)


def _pow(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """x^c for one constant c: g c x^(c − 1)."""
    exponent = fold(node.inputs[1])
    if wanted[1] or exponent is None or exponent.size != 1:
        raise NoDerivativeError
    x, c = node.inputs[0], float(exponent.load().reshape(-1)[0])
    slope = t.op("Mul", x, t.number(2)) if c == 2 else t.op("Mul", t.op("Pow", x, t.number(c - 1)), t.number(c))
    return _each(t, node, [t.op("Mul", _first(g), slope), None], wanted)


def _where(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    chosen, zero = node.inputs[0], t.number(0)
    return _each(t, node, [None, t.op("Where", chosen, _first(g), zero), t.op("Where", chosen, zero, _first(g))], wanted)


def _extreme(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """Max, Min, Clip: to the first input that the output is equal to."""
    if any(wanted[1:]) and node.op == "Clip":
        raise NoDerivativeError
    left, found = _first(g), list[gs.Tensor | None]()
    for x in node.inputs if node.op != "Clip" else node.inputs[:1]:
        here = t.op("Equal", node.outputs[0], x)
        found.append(t.op("Where", here, left, t.number(0)))
        left = t.op("Where", here, t.number(0), left)
    return _each(t, node, found + [None] * (len(node.inputs) - len(found)), wanted)


def _same(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    return [g[0], *[None] * (len(node.inputs) - 1)]


def _dropout(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """The identity, but where it is told to train."""
    training = fold(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
    if len(node.inputs) > 2 and node.inputs[2].name and (training is None or bool(training.load().any())):
        raise NoDerivativeError
    return _same(t, node, g, wanted)


def _slope(of: str) -> Rule:
    """g times the slope that ``_SLOPES[of]`` writes."""
    def rule(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
        return [t.op("Mul", _first(g), _SLOPES[of](t, node)), *[None] * (len(node.inputs) - 1)]

    return rule


def _one_less(t: Tape, x: gs.Tensor) -> gs.Tensor:
    return t.op("Sub", t.number(1), x)


def _gelu(t: Tape, node: gs.Node) -> gs.Tensor:
    """Φ(x) + x φ(x); or of the form with tanh, v = tanh(u): ½ (1 + v) + ½ x (1 − v²) u′, u = √(2/π) (x + 0.044715 x³)."""
    x, half = node.inputs[0], t.number(0.5)
    if node.attrs.get("approximate", "none") == "tanh":
        square = t.op("Mul", x, x)
        scale = math.sqrt(2 / math.pi)
        u = t.op("Mul", x, t.op("Add", t.number(scale), t.op("Mul", square, t.number(0.044715 * scale))))
        v = t.op("Tanh", u)
        rise = t.op("Add", t.number(scale), t.op("Mul", square, t.number(3 * 0.044715 * scale)))
        bend = t.op("Mul", t.op("Mul", x, rise), _one_less(t, t.op("Mul", v, v)))
        return t.op("Mul", half, t.op("Add", t.op("Add", t.number(1), v), bend))
    below = t.op("Mul", half, t.op("Add", t.number(1), t.op("Erf", t.op("Mul", x, t.number(math.sqrt(0.5))))))
    bell = t.op("Exp", t.op("Mul", t.op("Mul", x, x), t.number(-0.5)))
    return t.op("Add", below, t.op("Mul", x, t.op("Mul", bell, t.number(1 / math.sqrt(2 * math.pi)))))


def _erf(t: Tape, node: gs.Node) -> gs.Tensor:
    x = node.inputs[0]
    return t.op("Mul", t.op("Exp", t.op("Neg", t.op("Mul", x, x))), t.number(2 / math.sqrt(math.pi)))


def _leaky(t: Tape, node: gs.Node) -> gs.Tensor:
    above = t.op("Greater", node.inputs[0], t.number(0))
    return t.op("Where", above, t.number(1), t.number(node.attrs.get("alpha", 0.01)))


def _elu(t: Tape, node: gs.Node) -> gs.Tensor:
    above = t.op("Greater", node.inputs[0], t.number(0))
    return t.op("Where", above, t.number(1), t.op("Add", node.outputs[0], t.number(node.attrs.get("alpha", 1.0))))


_SLOPES = {
    "Neg": lambda t, node: t.number(-1),
    "Sqrt": lambda t, node: t.op("Div", t.number(0.5), node.outputs[0]),
    "Reciprocal": lambda t, node: t.op("Neg", t.op("Mul", node.outputs[0], node.outputs[0])),
    "Exp": lambda t, node: node.outputs[0],
    "Log": lambda t, node: t.op("Reciprocal", node.inputs[0]),
    "Abs": lambda t, node: t.op("Sign", node.inputs[0]),
    "Tanh": lambda t, node: _one_less(t, t.op("Mul", node.outputs[0], node.outputs[0])),
    "Sigmoid": lambda t, node: t.op("Mul", node.outputs[0], _one_less(t, node.outputs[0])),
    "Softplus": lambda t, node: t.op("Sigmoid", node.inputs[0]),
    "Relu": lambda t, node: t.op("Where", t.op("Greater", node.inputs[0], t.number(0)), t.number(1), t.number(0)),
    "LeakyRelu": _leaky,
    "Elu": _elu,
    "Erf": _erf,
    "Gelu": _gelu,
}

RULES: dict[str, Rule] = {"Add": _add, "Sum": _add, "Sub": _sub, "Mul": _mul, "Div": _div, "Pow": _pow, "Where": _where,
                          "Max": _extreme, "Min": _extreme, "Clip": _extreme, "Identity": _same, "Dropout": _dropout,
                          "Cast": _same} | {name: _slope(name) for name in _SLOPES}
