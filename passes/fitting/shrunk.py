"""A thin matrix that holds an identity, and is stored and multiplied without it.

    U = P [I; U'],   x U = x_S + x_T U'        S: the r rows of U that are the identity, T: the others

Every U V of rank r can be written so: with U = Q R (Q orthonormal) and U' = Q_T Q_S⁻¹ it is U V = P [I; U'] (U_S V). That is r²
numbers and r² multiply-adds fewer, for the same result but for rounding, which grows by the condition number of Q_S.

Source: MatShrink, doc/matShrink.pdf of github.com/OpenMachine-ai/transformer-tricks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.builder import Builder

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
OPSET = 13
"""The first whose Split takes the sizes as an input."""


@dataclass(frozen=True)
class Shrunk:
    """``[d_in, r]``, r of its rows an identity.

    Attributes:
        taken: S ``[r]``; rest: T ``[d_in − r]``, ascending where S is.
        matrix: U' ``[d_in − r, r]``.
    """

    taken: Indices
    rest: Indices
    matrix: Array

    def dense(self) -> Array:
        """U, with its identity."""
        whole = np.empty((len(self.taken) + len(self.rest), len(self.taken)), self.matrix.dtype)
        whole[self.taken] = np.eye(len(self.taken))
        whole[self.rest] = self.matrix
        return whole


Factor = Array | Shrunk
Stored = tuple[gs.Constant, ...]
"""Of a matrix: itself. Of a shrunk one: U', and the sizes of S and T where x is split, or else S and T themselves."""


def shrink(first: Array, second: Array, epsilon: float) -> tuple[Shrunk, Array] | None:
    """U' and V' of U ``[d_in, r]`` and V ``[r, d_out]``, or None where no rows of U are well conditioned.

    The first r rows are taken if they will do, for on a CPU a Gather of features costs much more than a Split; else those that
    pivoting finds. They will do up to a condition number of 1 / √ε: half of the digits that the type has are left then.

    Args:
        epsilon: of the type that the weights are stored in.
    """
    from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

    d_in, rank = first.shape
    if rank >= d_in:
        return None
    orthonormal, _ = linalg.qr(first, mode="economic", check_finite=False)
    largest = epsilon ** -0.5
    taken: Indices = np.arange(rank)
    if np.linalg.cond(orthonormal[taken]) > largest:
        _, _, order = linalg.qr(orthonormal.T, mode="economic", pivoting=True, check_finite=False)
        taken = np.sort(order[:rank]).astype(np.int64)
        if np.linalg.cond(orthonormal[taken]) > largest:
            return None
    rest = np.setdiff1d(np.arange(d_in), taken)
    matrix = np.linalg.solve(orthonormal[taken].T, orthonormal[rest].T).T
    return Shrunk(taken, rest, matrix), first[taken] @ second


def product(factors: Sequence[Factor]) -> Array:
    """All of them multiplied."""
    whole, *others = (factor.dense() if isinstance(factor, Shrunk) else factor for factor in factors)
    for each in others:
        whole = whole @ each
    return whole


def store(build: Builder, factor: Factor, hint: str) -> Stored:
    """The constants of ``factor``."""
    if not isinstance(factor, Shrunk):
        return (build.constant(factor, f"{hint}_weight"),)
    weight = build.constant(factor.matrix, f"{hint}_shrunk_weight")
    rank = len(factor.taken)
    if (factor.taken == np.arange(rank)).all():
        return weight, build.integers([rank, len(factor.rest)], f"{hint}_sizes")
    return weight, build.integers(factor.taken.tolist(), f"{hint}_taken"), build.integers(factor.rest.tolist(), f"{hint}_rest")


def multiply(build: Builder, value: gs.Tensor, stored: Stored, hint: str) -> gs.Tensor:
    """``value``, its features on the last axis, times what is stored."""
    weight, *places = stored
    if not places:
        return build.op("MatMul", value, weight, hint=hint)
    taken, rest = build.value(f"{hint}_taken"), build.value(f"{hint}_rest")
    if len(places) == 1:
        build.nodes("Split", [value, places[0]], [taken, rest], hint=f"{hint}_split", axis=-1)
    else:
        taken, rest = (build.op("Gather", value, each, hint=f"{hint}_gather", axis=-1) for each in places)
    return build.op("Add", taken, build.op("MatMul", rest, weight, hint=hint), hint=f"{hint}_sum")
