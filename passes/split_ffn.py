"""split-ffn: the neurons that say most as they are, the rest in low rank and int8."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..graph.block import FFNBlock
from ..graph.builder import Builder
from ..graph.model import Model
from ..graph.narrow import narrow, why_not_narrow
from ..graph.region import Leaf
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .fitting.evidence import Evidence, Streams, Target
from .fitting.linear_tasks import Task, change_hidden, fitted_task
from .fitting.low_rank import spectrum
from .fitting.measure import unmeasurable
from .int8.thin_int8 import Storage, add_thin, store

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
_RIDGE = 1e-3  # of the second moment of each neuron


@dataclass(frozen=True)
class SplitFFN(BlockPass):
    """Keep the neurons with the largest outputs as they are, and put the others in low rank and int8.

        y = h(x) W + b   →   ŷ = h_S(x) V_S + h_R(x) A B + c

    S is the part ``keep`` of the neurons with the largest outputs, E[h_i²] ‖w_i‖², R the rest. h_R is computed by thin matrices
    too, ``act((x C) D + b_R)``, so that of R's numbers the part ``ratio`` stays, in a quarter of the bytes (``storage``:
    ``weight-only`` DequantizeLinear, ``dynamic`` integer products with a scale for each row, ``float``).

    C D is whitened by the inputs as in ``factorize-ffn``. The down projection is solved for anew after that, towards what the
    original model has there (``target``); A B is what is left of its rows for R in low rank, whitened by what h_R has that h_S
    cannot say, and V_S makes good what A B has lost.

    Does not fire on packed experts, integer weights, weights that the caller may override, blocks with a norm over their neurons
    or an activation fused into a projection, blocks inside subgraphs, or where all neurons would stay or nothing would get
    smaller.

    Source: FFSplit, arXiv 2401.04044; SVD-LLM, arXiv 2403.07378.
    """

    name: ClassVar[str] = "split-ffn"
    exact: ClassVar[bool] = False
    keep: float = field(default=0.25, metadata={"help": "how many neurons stay as they are; below 1 a part of them"})
    ratio: float = field(default=0.5, metadata={"help": "part of the numbers of the other neurons that stays"})
    storage: Storage = field(default="weight-only", metadata={"help": "how the thin matrices are stored and multiplied"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    target: Target = field(default="stream", metadata={"help": "what the down projection is fitted to"})
    multiple: int = field(default=32, metadata={"help": "the number that stays is rounded up to a multiple of this"})

    def __post_init__(self) -> None:
        if not self.keep > 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise ValueError(f"keep={self.keep} must be a number of neurons, or a part of them below 1")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must lie between 0 and 1")
        if self.multiple < 1:
            raise ValueError("multiple must be 1 or more")

    @property
    def needs_feeds(self) -> bool:
        """Always: the outputs of the neurons are measured."""
        return True

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be split."""
        reason = why_not_narrow(block)
        if reason is None and self._width(block) >= block.d_ff:
            reason = f"all of its {block.d_ff} neurons would stay"
        if reason is None and any(not self._rank(*shape) for shape in self._shapes(block)):
            reason = f"the other {block.d_ff - self._width(block)} neurons have too few numbers for a low rank"
        return None if reason is None else Refused(reason, block.output.name)

    def run(self, model: Model, context: Context) -> PassResult:
        """Fit and rewrite the blocks, each on what the ones before it give."""
        with Streams(model, context) as streams:
            return super().run(model, dataclasses.replace(context, streams=streams))

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> Evidence | Refused:
        """Moments of the inputs and of the neurons."""
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        assert context.streams is not None
        found = context.streams.evidence(block, inputs=True, neurons=True, weight=self.weight, target=self.target)
        return found if found.rows else found.finite.why_none(block.input.name)

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put both parts in place."""
        assert isinstance(statistics, Evidence)
        assert context.streams is not None
        moments, inputs = statistics.everything(), block.d_model
        mean, covariance = moments.mean, moments.covariance
        square = np.diag(covariance) + mean ** 2
        loud = square[inputs:inputs + block.d_ff] * (block.down.weight().astype(np.float64) ** 2).sum(axis=1)
        order = np.argsort(-loud, kind="stable")
        stay, rest = (np.sort(part) for part in np.split(order, [self._width(block)]))
        nodes: list[gs.Node] = []
        gram = covariance[:inputs, :inputs]

        def thin(leaf: Leaf, matrix: Array, bias: Array | None, hint: str) -> gs.Tensor:
            wanted = matrix.astype(np.float64)
            of_mean = gram if bias is not None else gram + np.outer(mean[:inputs], mean[:inputs])
            factors = spectrum(wanted, of_mean).factors(self._rank(*matrix.shape))
            if bias is not None:
                bias = bias + mean[:inputs] @ (wanted - factors[0] @ factors[1])
            build = Builder(model, block.graph, block.name, leaf.linear.onnx_type)
            result, made = add_thin(build, block.input, factors, bias, block.axis, f"rest_{hint}")
            nodes.extend(made)
            return result

        kept, others = narrow(model, block, stay), narrow(model, block, rest, thin)
        task = self._down(model, block, np.concatenate([stay, rest]), kept, others, context)
        matrix, factors = _split(task, len(stay), self._rank(len(rest), block.d_out))
        build = Builder(model, block.graph, block.name, block.down.linear.onnx_type)
        bias = task.bias_of(np.concatenate([matrix, factors[0] @ factors[1]])) if task.mean is not None else block.down.bias()
        first = build.linear(kept, matrix, bias, axis=block.axis, hint="kept_down")
        second, made = add_thin(build, others, factors, None, block.axis, "rest_down")
        block.replace(build.op("Add", first, second, hint="parts"))
        nodes += made
        store(model, block, [node for node in nodes if any(node is each for each in block.graph.nodes)], self.storage)
        context.streams.rewritten(block.output.name)
        return Rewritten(gone="split")

    def _down(self, model: Model, block: FFNBlock, order: Indices, kept: gs.Tensor, others: gs.Tensor,
              context: Context) -> Task:
        """The task of the down projection over the neurons in ``order``, those of the rest being what they are now."""
        assert context.streams is not None
        down = block.down.linear
        prior = down.weight().astype(np.float64)[order]
        build = Builder(model, block.graph, block.name, down.onnx_type)
        change_hidden(model, block, build.op("Concat", kept, others, hint="joined", axis=block.axis), prior, context)
        evidence = context.streams.evidence(block, inputs=False, neurons=True, weight=self.weight, target=self.target)
        return fitted_task(block, prior, evidence, block.down.has_bias)

    def _width(self, block: FFNBlock) -> int:
        """Neurons that stay as they are."""
        count = self.keep if self.keep >= 1 else self.keep * block.d_ff
        return min(int(np.ceil(count / self.multiple - 1e-9)) * self.multiple, block.d_ff)

    def _rank(self, d_in: int, d_out: int) -> int:
        return int(self.ratio * d_in * d_out / (d_in + d_out))

    def _shapes(self, block: FFNBlock) -> list[tuple[int, int]]:
        """Of the matrices of the other neurons."""
        rest = block.d_ff - self._width(block)
        return [(block.d_model, rest), (rest, block.d_out)]


def _split(task: Task, stay: int, rank: int) -> tuple[Array, tuple[Array, Array]]:
    """V_S and the factors A, B of W* = [W_S; W_R]: what A B loses is made good by V_S as far as h_S can say it.

        K = G_SS⁻¹ G_SR,   V_S = W_S + K (W_R − A B),   A B: W_R in low rank for the moments G_RR − G_RS K
    """
    from scipy import linalg  # takes 0.3 s to import, which passes that fit nothing are spared

    gram, wanted = task.gram, task.wanted
    assert gram is not None
    inner, cross = gram[:stay, :stay].copy(), gram[:stay, stay:]
    diagonal = np.diag(inner)
    inner[np.diag_indices_from(inner)] += _RIDGE * (diagonal + 1e-3 * float(diagonal.mean()) + 1e-30)
    said = linalg.solve(inner, cross, assume_a="sym", check_finite=False)
    factors = spectrum(wanted[stay:], gram[stay:, stay:] - cross.T @ said).factors(rank)
    return wanted[:stay] + said @ (wanted[stay:] - factors[0] @ factors[1]), factors
