"""What lies between a block and the residual Add: a scale for each channel (LayerScale), or a norm.

    scale:   b = λ ∘ y + β
    rms:     b = λ ∘ y / rms(y) + β
    layer:   b = λ ∘ (y − mean(y)) / std(y) + β

Which of the three it is, and λ, is read off what the nodes between make of numbers drawn at random, so it does not matter how
they are spelled.

Source: LayerScale, arXiv 2103.17239; norms behind sublayers, arXiv 2105.13290.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock
from ...graph.errors import InputError
from ...graph.model import Model
from ...graph.types import numpy_type
from ...runtime import open_session
from .bypass import is_pure_branch

Array = npt.NDArray[Any]
Kind = Literal["scale", "rms", "layer"]
_TOKENS = 48  # drawn
_AS_GOOD = 1e-2  # of the branch's size: how far it may be from what one of the three gives
_SMALLEST = 1e-3  # of the root mean square of λ: smaller entries are taken for this, and of a scale make nothing good
_DAMPED = 0.01  # of the mean of λ²: behind a norm, a channel whose λ² is smaller is not wholly brought back


@dataclass(frozen=True)
class Branch:
    """What the residual Add receives of y.

    Attributes:
        kind: which of the three.
        scale: λ ``[d_out]``, nowhere zero.
        part: ``[d_out]``, how much of what the stream lacks the branch is to make good.
    """

    kind: Kind
    scale: Array
    part: Array

    def towards(self, y: Array, missing: Array) -> Array:
        """y ``[n, d_out]`` moved so that the branch moves by ``missing [n, d_out]``, or that part of it.

        Behind a norm the first order alone is looked at: the length of y, and its mean behind one that centres, change nothing.
        """
        with np.errstate(all="ignore"):  # what is not finite stays so, and whoever fits leaves it out
            moved = missing / self.scale * self.part
            if self.kind == "scale":
                return y + moved
            straight = y.astype(np.float64)
            if self.kind == "layer":
                moved -= moved.mean(axis=1, keepdims=True)
                straight = straight - straight.mean(axis=1, keepdims=True)
            square = (straight ** 2).mean(axis=1, keepdims=True) + 1e-30
            along = (moved * straight).mean(axis=1, keepdims=True) / square
            return y + np.sqrt(square) * (moved - along * straight)

    def in_stream(self, y: Array, others: list[Array]) -> tuple[Array, list[Array]]:
        """Of y and the residual, what the next norm reads the sum of: one right behind the block reads y alone."""
        return (y * self.scale, others) if self.kind == "scale" else (y, [])


def branch_of(model: Model, block: FFNBlock, provider: str = "cpu", threads: int | None = None) -> Branch | None:
    """What lies between ``block`` and the residual Add; None where it is nothing or none of the three, or cannot be measured."""
    if block.join.direct or block.axis != -1 or block.graph is not model.graph or not is_pure_branch(block):
        return None
    y, branch = block.output, block.join.branch
    rank = len(y.shape) if y.shape else 3
    shape = (_TOKENS, block.d_out) if rank == 2 else (*[1] * (rank - 3), 2, _TOKENS // 2, block.d_out)  # tokens swapped show
    random = np.random.default_rng(0)
    drawn = random.standard_normal((_TOKENS, block.d_out)) * np.exp(random.uniform(-1, 1, (_TOKENS, 1))) + 0.1
    given = drawn.astype(numpy_type(block.onnx_type))
    try:
        session = open_session(model, provider=provider, threads=threads, outputs=[branch.name],
                               inputs={y.name: block.onnx_type})
        if [spec.name for spec in session.inputs] != [y.name]:
            return None
        result = session.run({y.name: given.reshape(shape)}, [branch.name])[branch.name]
    except InputError:
        return None
    if result.size != given.size:
        return None
    with np.errstate(all="ignore"):
        return _read(given.astype(np.float64), result.reshape(given.shape).astype(np.float64))


def _read(y: Array, branch: Array) -> Branch | None:
    centred = y - y.mean(axis=1, keepdims=True)
    tried: dict[Kind, Array] = {"scale": y, "rms": y / np.sqrt((y ** 2).mean(axis=1, keepdims=True)),
                                "layer": centred / centred.std(axis=1, keepdims=True)}
    moves = branch - branch.mean(axis=0)
    for kind, given in tried.items():
        apart = given - given.mean(axis=0)
        scale = (apart * moves).sum(axis=0) / (apart ** 2).sum(axis=0)
        left, size = moves - apart * scale, float(np.sqrt((scale ** 2).mean()))
        if size > 0 and np.isfinite(left).all() and np.abs(left).max() <= _AS_GOOD * np.abs(moves).max():
            floor = _SMALLEST * size
            alive = np.abs(scale) >= floor
            scale = np.where(alive, scale, np.where(scale < 0, -floor, floor))
            square = scale ** 2
            part = alive.astype(np.float64) if kind == "scale" else square / (square + _DAMPED * square.mean())
            return Branch(kind, scale, part)
    return None
