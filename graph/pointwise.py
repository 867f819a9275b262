"""Operators that act on each number alone, as NumPy functions (ONNX operator specification; ORT's ContribOperators.md).

The table says two things at once: that a region may contain the operator, and what it computes, so that an activation
can be named, fitted and re-emitted from its numbers. Norms and Q/DQ pairs count as the identity here: ``region.py``
marks them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Attributes = Mapping[str, Any]
Function = Callable[[Sequence[Array], Attributes], Array]
_MANY = 10_000
_ERF = np.frompyfunc(math.erf, 1, 1)


def erf(x: Array) -> Array:
    """The error function."""
    if np.size(x) < _MANY:
        return np.asarray(_ERF(np.asarray(x, np.float64)), np.float64)
    from scipy import special  # takes 0.1 s to import, which a few numbers are not worth

    return np.asarray(special.erf(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))"""
    with np.errstate(over="ignore"):  # exp(1000) is infinite, and 1 / infinity is 0
        return np.asarray(1 / (1 + np.exp(-x)))


def gelu(x: Array) -> Array:
    """x Φ(x) (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2))))


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU."""
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def silu(x: Array, alpha: float = 1.0) -> Array:
    """x σ(alpha x); alpha = 1.702 is quick_gelu."""
    return np.asarray(x * sigmoid(alpha * x))


def mish(x: Array) -> Array:
    """x tanh(softplus(x)) (Misra, arXiv 1908.08681)."""
    return np.asarray(x * np.tanh(np.logaddexp(0, x)))


def elu(x: Array, alpha: float = 1.0) -> Array:
    """x for x > 0, else alpha (exp x − 1)."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _gelu(inputs: Sequence[Array], attrs: Attributes) -> Array:
    return (gelu_tanh if attrs.get("approximate", "none") == "tanh" else gelu)(inputs[0])


def _biased(function: Callable[[Array], Array]) -> Function:
    return lambda inputs, attrs: function(inputs[0] + inputs[1] if len(inputs) > 1 else inputs[0])


def _clip(inputs: Sequence[Array], attrs: Attributes) -> Array:
    low = inputs[1] if len(inputs) > 1 and inputs[1].size else attrs.get("min", -np.inf)
    high = inputs[2] if len(inputs) > 2 and inputs[2].size else attrs.get("max", np.inf)
    return np.asarray(np.minimum(np.maximum(inputs[0], low), high))


def _unary(function: Callable[[Array], Array]) -> Function:
    return lambda inputs, attrs: function(inputs[0])


def _binary(function: Callable[[Array, Array], Array]) -> Function:
    return lambda inputs, attrs: function(inputs[0], inputs[1])


def _folded(function: Callable[[Array, Array], Array]) -> Function:
    def apply(inputs: Sequence[Array], attrs: Attributes) -> Array:
        result = inputs[0]
        for other in inputs[1:]:
            result = function(result, other)
        return result
    return apply


def _where(inputs: Sequence[Array], attrs: Attributes) -> Array:
    return np.where(inputs[0].astype(bool), inputs[1], inputs[2])


def _hard_sigmoid(inputs: Sequence[Array], attrs: Attributes) -> Array:
    return np.clip(attrs.get("alpha", 0.2) * inputs[0] + attrs.get("beta", 0.5), 0, 1)


def _selu(inputs: Sequence[Array], attrs: Attributes) -> Array:
    return np.asarray(attrs.get("gamma", 1.0507009873554805) * elu(inputs[0], attrs.get("alpha", 1.6732632423543772)))


def _shrink(inputs: Sequence[Array], attrs: Attributes) -> Array:
    x, lambd, bias = inputs[0], attrs.get("lambd", 0.5), attrs.get("bias", 0.0)
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0.0))


def _batch_norm(inputs: Sequence[Array], attrs: Attributes) -> Array:
    x, scale, shift, mean, variance = inputs
    return np.asarray((x - mean) / np.sqrt(variance + attrs.get("epsilon", 1e-5)) * scale + shift)


POINTWISE: dict[tuple[str, str], Function] = {
    ("", "Relu"): _unary(lambda x: np.maximum(x, 0)),
    ("", "LeakyRelu"): lambda inputs, attrs: np.where(inputs[0] >= 0, inputs[0], attrs.get("alpha", 0.01) * inputs[0]),
    ("", "PRelu"): lambda inputs, attrs: np.where(inputs[0] >= 0, inputs[0], inputs[1] * inputs[0]),
    ("", "ThresholdedRelu"): lambda inputs, attrs: np.where(inputs[0] > attrs.get("alpha", 1.0), inputs[0], 0.0),
    ("", "Elu"): lambda inputs, attrs: elu(inputs[0], attrs.get("alpha", 1.0)),
    ("", "Celu"): lambda inputs, attrs: elu(inputs[0] / attrs.get("alpha", 1.0)) * attrs.get("alpha", 1.0),
    ("", "Selu"): _selu,
    ("", "Gelu"): _gelu,
    ("", "Sigmoid"): _unary(sigmoid),
    ("", "HardSigmoid"): _hard_sigmoid,
    ("", "HardSwish"): _unary(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("", "Swish"): lambda inputs, attrs: silu(inputs[0], attrs.get("alpha", 1.0)),
    ("", "Mish"): _unary(mish),
    ("", "Softplus"): _unary(lambda x: np.logaddexp(0, x)),
    ("", "Softsign"): _unary(lambda x: x / (1 + np.abs(x))),
    ("", "Shrink"): _shrink,
    ("", "Tanh"): _unary(np.tanh), ("", "Erf"): _unary(erf), ("", "Exp"): _unary(np.exp),
    ("", "Log"): _unary(np.log), ("", "Sqrt"): _unary(np.sqrt), ("", "Neg"): _unary(np.negative),
    ("", "Abs"): _unary(np.abs), ("", "Reciprocal"): _unary(np.reciprocal), ("", "Sign"): _unary(np.sign),
    ("", "Sin"): _unary(np.sin), ("", "Cos"): _unary(np.cos), ("", "Floor"): _unary(np.floor),
    ("", "Ceil"): _unary(np.ceil), ("", "Round"): _unary(np.round), ("", "Not"): _unary(np.logical_not),
    ("", "Sinh"): _unary(np.sinh), ("", "Cosh"): _unary(np.cosh), ("", "Atan"): _unary(np.arctan),
    ("", "IsNaN"): _unary(np.isnan),
    ("", "Add"): _binary(np.add), ("", "Sub"): _binary(np.subtract), ("", "Mul"): _binary(np.multiply),
    ("", "Div"): _binary(np.divide), ("", "Pow"): _binary(np.power),
    ("", "Max"): _folded(np.maximum), ("", "Min"): _folded(np.minimum), ("", "Sum"): _folded(np.add),
    ("", "Greater"): _binary(np.greater), ("", "Less"): _binary(np.less), ("", "Equal"): _binary(np.equal),
    ("", "GreaterOrEqual"): _binary(np.greater_equal), ("", "LessOrEqual"): _binary(np.less_equal),
    ("", "And"): _binary(np.logical_and), ("", "Or"): _binary(np.logical_or),
    ("", "Clip"): _clip, ("", "Where"): _where, ("", "BatchNormalization"): _batch_norm,
    ("com.microsoft", "Gelu"): _unary(gelu),
    ("com.microsoft", "BiasGelu"): _biased(gelu),
    ("com.microsoft", "FastGelu"): _biased(gelu_tanh),
    ("com.microsoft", "QuickGelu"): lambda inputs, attrs: silu(inputs[0], attrs.get("alpha", 1.702)),
}

CONTRIB_WITH_BIAS = frozenset({"BiasGelu", "FastGelu"})

FUSED: dict[str, Callable[[Array, Attributes], Array]] = {
    "Relu": lambda x, attrs: np.maximum(x, 0),
    "LeakyRelu": lambda x, attrs: np.where(x >= 0, x, attrs.get("activation_alpha", 0.01) * x),
    "Sigmoid": lambda x, attrs: sigmoid(x),
    "Tanh": lambda x, attrs: np.tanh(x),
    "Softplus": lambda x, attrs: np.logaddexp(0, x),
    "Softsign": lambda x, attrs: x / (1 + np.abs(x)),
    "Elu": lambda x, attrs: elu(x, attrs.get("activation_alpha", 1.0)),
    "HardSigmoid": lambda x, attrs: np.clip(attrs.get("activation_alpha", 0.2) * x + attrs.get("activation_beta", 0.5), 0, 1),
    "ThresholdedRelu": lambda x, attrs: np.where(x > attrs.get("activation_alpha", 1.0), x, 0.0),
    "Clip": lambda x, attrs: np.clip(x, *attrs.get("activation_params", (-np.inf, np.inf))),
}
"""Activations inside FusedGemm and FusedConv, by name."""
