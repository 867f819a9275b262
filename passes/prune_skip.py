"""prune-skip: the residual Add around an FFN taken out, exactly where the FFN is affine, else by a fit to the sum."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..graph.block import OVERRIDABLE, FFNBlock
from ..graph.builder import Builder
from ..graph.constant import fold
from ..graph.edit import consumers, is_output, producer, remove_dead, take_over
from ..graph.linear import Linear, read_linear
from ..graph.model import Model
from ..graph.narrow import why_not_narrow
from ..graph.norm import read_norm
from ..graph.residual import SKIP_NORMS, Join
from ..graph.shapes import root
from ..graph.weights import ComputedValues
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .exact.sharing import is_read_elsewhere
from .fitting.bypass import Only, drop_residual, is_pure_branch, stream_type
from .fitting.evidence import Evidence, Streams
from .fitting.measure import unmeasurable
from .fitting.neuron_fit import Features, NeuronFit, choose_ridge, refit
from .fitting.neuron_selection import select_neurons
from .fitting.token_weights import has_branch_norm
from .slim_ffn import SlimFFN

Array = npt.NDArray[Any]
_GREEDY_RIDGE = 1e-3
_SLIM = SlimFFN()


@dataclass(frozen=True)
class PruneSkip(BlockPass):
    """Take out the Add of a residual and what an FFN makes of it.

        x + (x A + b)   →   x (A + I) + b                        exact; A square, in every graph
        r + f(x)        →   x A + h_S(x) V + c ≈ r + f(x)        fit=slim, with feeds

    The first is done wherever a linear reads the residual itself, as an FFN does after ``linearize-ffn`` in post-norm models. The
    second is ``slim-ffn`` with another target: the ``keep`` most useful neurons and the affine map are refitted in closed form to
    the whole sum, block after block, towards the residual stream of the original model; where x is r (post-norm) the fit
    begins at A = I.

    Does not fire where the affine map reads a norm of the residual (the sum is then no function of what it reads), where its
    weight is shared, so that the file would grow, is stored as integers or may be overridden, or where something else reads
    what it gives; ``fit=slim`` not where the branch has a norm or scale of its own or carries something else too, nor where
    ``slim-ffn`` does not fire.

    Source: transformers without skips, trained so, arXiv 2302.10322, 2311.01906; the fit, docs/approximations.md.
    """

    name: ClassVar[str] = "prune-skip"
    exact: ClassVar[bool] = False
    fit: Literal["none", "slim"] = field(default="none", metadata={"help": "what FFN blocks with an activation become"})
    keep: float = field(default=1.0, metadata={"help": "of fit=slim: part of the neurons that stays"})
    affine: bool = field(default=True, metadata={"help": "of fit=slim: an affine map of the input beside the neurons"})
    weight: Literal["auto", "none"] = field(default="auto", metadata={"help": "how tokens are weighted"})
    vary: int = field(default=0, metadata={"help": "varied copies of each feed to fit on beside it"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} is not above 0 and up to 1")
        if self.vary < 0:
            raise ValueError(f"vary={self.vary}: copies cannot be fewer than none")

    @property
    def needs_feeds(self) -> bool:
        """Only the fit."""
        return self.fit == "slim"

    def check(self, block: FFNBlock) -> Refused | None:
        """What cannot be refitted to the sum."""
        reason = why_not_narrow(block)
        if reason is not None:
            return Refused(reason, block.output.name)
        if not is_pure_branch(block):
            return Refused("its branch into the residual Add carries something else too, or is read elsewhere",
                           block.join.branch.name)
        if not block.join.direct or has_branch_norm(block):
            return Refused("its branch into the residual Add has a norm or a scale", block.join.branch.name)
        return None

    def run(self, model: Model, context: Context) -> PassResult:
        """Fold what is affine; then refit the blocks, each on what the ones before it give."""
        folded, refused = 0, []
        for _, graph in model.graphs():
            for node in list(graph.nodes):
                outcome = _fold(model, graph, node) if node.outputs else None
                if isinstance(outcome, Refused):
                    refused.append(outcome)
                elif outcome:
                    folded += 1
        if folded:
            context.ledger.refresh(self.name)
        if self.fit == "none":
            return self.result(folded, [*refused, *self._curved(context)])
        with Streams(model, context, self.vary) as streams:
            result = super().run(model, dataclasses.replace(context, streams=streams))
        return dataclasses.replace(result, fired=result.fired + folded, refused=[*refused, *result.refused])

    def _curved(self, context: Context) -> list[Refused]:
        """The blocks that are no affine map."""
        there, gone = context.ledger.select(self.blocks)
        reason = "it has an activation: make it affine first (linearize-ffn), or give fit=slim"
        return [*gone, *(Refused(reason, block.output.name, index) for index, block in there.items())]

    def statistics(self, model: Model, block: FFNBlock, context: Context) -> object:
        """The neurons that stay, and the maps to the whole sum."""
        refusal = unmeasurable(model, block)
        if refusal is not None:
            return refusal
        assert context.streams is not None
        evidence = context.streams.evidence(block, inputs=self.affine, neurons=True, weight=self.weight, target="sum")
        if not evidence.rows:
            return evidence.finite.why_none(block.input.name)
        return self._fit(block, evidence)

    def _fit(self, block: FFNBlock, evidence: Evidence) -> NeuronFit:
        inputs = block.d_model if self.affine else 0
        same = root(block.join.residual) is root(block.input)
        identity = np.eye(inputs, block.d_out) if same else np.zeros((inputs, block.d_out))
        prior = np.concatenate([identity, block.down.weight().astype(np.float64)])
        everything = Features.of(evidence.everything(), prior, inputs)
        width = max(1, round(self.keep * block.d_ff))
        neurons = (np.arange(block.d_ff) if width == block.d_ff
                   else select_neurons("greedy", everything, width, _GREEDY_RIDGE))
        halves = bool(evidence.fit.rows and evidence.held_out.rows)
        fit = Features.of(evidence.fit, prior, inputs) if halves else everything
        held_out = Features.of(evidence.held_out, prior, inputs) if halves else None
        return refit(everything, neurons, *choose_ridge(fit, held_out, neurons))

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Put the fit in the block's place, and take the residual out of the Add."""
        after = [output.name for output in block.join.node.outputs if output.name]
        _SLIM.rewrite(model, block, statistics, context)
        block.settle()
        drop_residual(Builder(model, block.graph, block.name, stream_type(block)), block)
        if context.streams is not None:
            for name in after:
                context.streams.rewritten(name)
        return Rewritten(gone="left without a residual")


def _fold(model: Model, graph: gs.Graph, node: gs.Node) -> bool | Refused:
    """``x + (x A + b) → x (A + I) + b`` in an Add or a SkipLayerNormalization."""
    if node.op not in SKIP_NORMS and (node.op != "Add" or node.domain not in (None, "", "ai.onnx")):
        return False
    for x, y in (node.inputs[:2], node.inputs[1::-1]):
        linear = _linear_of(y)
        if linear is None or linear.d_in != linear.d_out:
            continue
        if linear.input is not x:
            if _is_norm_of(linear.input, x):
                return Refused("it reads a norm of the residual, of which the sum is no function", y.name)
            continue
        reason = _why_not(graph, linear)
        if reason is not None:
            return Refused(reason, y.name)
        build = Builder(model, graph, linear.node.name or "prune_skip", linear.onnx_type)
        weight = ComputedValues((linear.d_in, linear.d_out), linear.onnx_type, partial(_plus_identity, linear))
        total = build.linear(x, weight, linear.bias() if linear.bias is not None else None, axis=linear.axis, hint="with_skip")
        old = producer(y)
        if node.op == "Add":
            take_over(node.outputs[0], total)
            remove_dead(graph, [node])
            return True
        take_over(y, total)
        remove_dead(graph, [old] if old is not None else [])
        drop_residual(build, Only("", graph, y, Join(node, y, x, True, []), linear.axis, linear.onnx_type))
        return True
    return False


def _linear_of(y: gs.Tensor) -> Linear | None:
    """The linear that gives ``y``, its bias included."""
    node = producer(y)
    if node is None:
        return None
    linear = read_linear(node)
    if linear is None and node.op == "Add":
        before = [producer(value) for value in node.inputs if fold(value) is None]
        linear = read_linear(before[0]) if len(before) == 1 and before[0] is not None else None
    return linear if linear is not None and linear.output is y else None


def _why_not(graph: gs.Graph, linear: Linear) -> str | None:
    if linear.quantized or linear.packed or linear.gathered or linear.fused_activation is not None:
        return "its weight is no plain float matrix"
    if linear.overridable or any(part is not None and part.overridable
                                 for node in linear.nodes for part in map(fold, node.inputs)):
        return OVERRIDABLE
    if len(consumers(linear.output)) != 1 or any(is_output(graph, tensor) for node in linear.nodes for tensor in node.outputs):
        return "something else reads what it gives"
    if is_read_elsewhere(linear.node, 1):
        return "its weight is shared, so that the file would grow"
    return None


def _is_norm_of(value: gs.Tensor, x: gs.Tensor) -> bool:
    node = producer(value)
    norm = read_norm(node) if node is not None else None
    return norm is not None and norm.input is x


def _plus_identity(linear: Linear) -> Array:
    matrix = linear.weight()
    return (matrix.astype(np.float64) + np.eye(len(matrix))).astype(matrix.dtype)
