"""sparsify-ffn: zeros in the weights of FFN blocks, the rest changed to make good for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from ..graph.block import FFNBlock
from ..graph.model import Model
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .fitting.evidence import Streams, Target
from .fitting.linear_tasks import Linearwise, Task, why_not_apart
from .fitting.sparse_weights import GROUP, by_sparsegpt, by_wanda

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SparsifyFFN(BlockPass):
    """Set a part of the weights of FFN blocks to zero.

        x W  →  x Ŵ        the part ``ratio`` of Ŵ is zero

    ``method=wanda`` takes the weights that matter least on the inputs of the feeds and leaves the others as they are;
    ``method=sparsegpt`` changes the others, so that ``‖X (W − Ŵ)‖`` stays small (see :mod:`sparse_weights`), and lets biases
    take the mean of what is lost. ``pattern=2:4`` has two zeros in every four inputs in a row.

    The file keeps its size until it is compressed, and ONNX Runtime multiplies by zeros like by any number: this is for engines
    that use them.

    Blocks are gone through in order of execution on what the rewritten blocks before them give; the down projection is solved for
    anew first, towards what the original model has there, as in ``factorize-ffn``.

    Does not fire on packed experts, integer weights, an activation fused into a projection, weights that the caller may override
    or that something else reads, blocks inside subgraphs, or, with ``pattern=2:4``, on widths that four does not divide.

    Source: Wanda, arXiv 2306.11695; SparseGPT, arXiv 2301.00774.
    """

    name: ClassVar[str] = "sparsify-ffn"
    exact: ClassVar[bool] = False
    pattern: Literal["unstructured", "2:4"] = field(default="unstructured", metadata={"help": "where zeros may be"})
    ratio: float = field(default=0.5, metadata={"help": "part of the weights that becomes zero"})
    method: Literal["sparsegpt", "wanda"] = field(default="sparsegpt", metadata={
        "help": "the other weights make good for the zeros, or stay"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Target = field(default="stream", metadata={"help": "what the down projection is fitted to"})

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must lie between 0 and 1")
        if self.pattern == "2:4" and self.ratio != 0.5:
            raise ValueError(f"pattern=2:4 has half of the weights zero, not ratio={self.ratio}")

    @property
    def needs_feeds(self) -> bool:
        """Always: it weighs by the inputs."""
        return True

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be replaced."""
        refusal = why_not_apart(block)
        if refusal is None and self.pattern == "2:4":
            for linear in block.linears():
                if linear.d_in % GROUP:
                    return Refused(f"{GROUP} does not divide its {linear.d_in} inputs", linear.output.name)
        return refusal

    def run(self, model: Model, context: Context) -> PassResult:
        """Go through the blocks, each on what the ones before it give."""
        with Streams(model, context) as streams:
            return super().run(model, dataclasses.replace(context, streams=streams))

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the sparse matrices in place."""
        there, _ = context.ledger.select(self.blocks)
        linears = Linearwise(model, context, self, list(there.values()), True, self.weight, self.target,
                             centred=self.method == "sparsegpt")
        return linears.replace(block, self._compress) or Rewritten()

    def _compress(self, task: Task) -> list[Array]:
        assert task.gram is not None
        groups = self.pattern == "2:4"
        if self.method == "wanda":
            return [by_wanda(task.wanted, np.diag(task.gram), self.ratio, groups=groups)]
        return [by_sparsegpt(task.wanted, task.gram, self.ratio, groups=groups)]
