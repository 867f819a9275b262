"""Derivatives of products of matrices."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..constant import fold
from .tape import Gradients, NoDerivativeError, Rule, Tape


def _matmul(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """X W: g Wᵀ and Xᵀ g, the latter added up over all rows at once where W is a constant matrix."""
    (x, w), reached = node.inputs, g[0]
    assert reached is not None
    known = [fold(each) for each in (x, w)]
    if any(each is not None and len(each.shape) < 2 for each in known):
        raise NoDerivativeError
    constant = isinstance(w, gs.Constant) and len(w.shape) == 2
    back = None
    if wanted[0]:
        turned = t.op("Transpose", w, perm=[1, 0]) if constant else t.swap(w)
        back = t.op("MatMul", reached, turned)
        back = back if constant else t.sum_to(back, x)
    if not wanted[1]:
        return [back, None]
    if not constant:
        return [back, t.sum_to(t.op("MatMul", t.swap(x), reached), w)]
    rows = t.op("Reshape", x, t.integers(-1, w.shape[0])), t.op("Reshape", reached, t.integers(-1, w.shape[1]))
    return [back, t.op("Gemm", *rows, transA=1)]


def _gemm(t: Tape, node: gs.Node, g: Gradients, wanted: list[bool]) -> Gradients:
    """α A B + β C, A and B as they are or turned."""
    a, b, *rest = node.inputs
    alpha, turned = node.attrs.get("alpha", 1.0), bool(node.attrs.get("transB", 0))
    reached = g[0]
    assert reached is not None
    if node.attrs.get("transA", 0):
        raise NoDerivativeError
    found: Gradients = [None, None]
    if wanted[0]:
        found[0] = t.op("Gemm", reached, b, alpha=alpha, transB=int(not turned))
    if wanted[1]:
        found[1] = t.op("Gemm", *((reached, a) if turned else (a, reached)), alpha=alpha, transA=1)
    if rest:
        beta = node.attrs.get("beta", 1.0)
        found.append(t.sum_to(t.op("Mul", reached, t.number(beta)), rest[0]) if wanted[2] else None)
    return found


RULES: dict[str, Rule] = {"MatMul": _matmul, "Gemm": _gemm}
