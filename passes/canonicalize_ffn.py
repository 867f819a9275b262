"""canonicalize-ffn: every FFN block in the form that ONNX Runtime fuses best."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_graphsurgeon as gs

from ..graph.block import FFNBlock
from ..graph.builder import Builder
from ..graph.edit import consumers, is_output, producer, remove_dead, take_over
from ..graph.model import Model
from .base import BlockPass, Context, PassResult, Refused, Rewritten
from .exact.alone import executed_alone
from .exact.canonical_linear import is_canonical, product, reason_against, reemit, repeat
from .exact.canonical_region import Core, Cut, best_core, core_of, cut_of, is_split, own_core, put, split
from .exact.canonical_weights import CanonicalWeights
from .exact.canonical_whole import can_be_whole, emit_whole


@dataclass(frozen=True)
class CanonicalizeFFN(BlockPass):
    """Re-emit FFN blocks from what was found in them, in one form.

        y = act(x W_up + b_up) W_down + b_down                            MatMul, Add, activation, MatMul, Add
        y = (act(x W_gate + b_gate) ∘ (x W_up + b_up)) W_down + b_down    with both halves of one matrix cut by a Split

    * A weight is an initializer ``[d_in, d_out]``: no Transpose, Identity, Cast or Constant node in front of it, no transB,
      no alpha. A Gemm stays one where its rows are two-dimensional anyway (it is what ONNX Runtime makes of MatMul and Add
      there); a 1×1 Conv, and the Gather that picks packed experts, stay what they are.
    * The activation is the native operator, or the chain that ONNX Runtime has one kernel for, where region and chain agree
      on a grid of numbers; otherwise the region's own nodes stay.
    * Reshapes to two dimensions and back go where the dimensions behind are sure to be those in front.

    Each of these is done only where ONNX Runtime, asked with the nodes alone, executes no more of them than before (of an
    activation and of a block without Reshapes: fewer). A block that is in this form already is left alone and not counted;
    ``all=true`` re-emits it too, all weights computed anew: the proof that what was found is what is there.

    Does not fire on weights stored as integers, where a value inside a linear is an output, or where all that is not
    canonical is a weight that something else reads too (it would be untied) or that would grow (stored in float16).

    Source: ONNX Runtime's GeluFusion, BiasGeluFusion, FastGeluFusion, QuickGeluFusion, MatMulAddFusion.
    """

    name: ClassVar[str] = "canonicalize-ffn"
    exact: ClassVar[bool] = True
    all: bool = field(default=False, metadata={"help": "re-emit blocks that are in the canonical form already, too"})

    def run(self, model: Model, context: Context) -> PassResult:
        """Re-emit the chosen blocks in place."""
        there, refused = self.able(context, settled=True)
        weights = CanonicalWeights([linear for block in there.values() for linear in block.linears()], context.memo, self.all)
        fired = 0
        for index, block in there.items():
            context.progress(f"{self.name}: block {index}")
            outcome = self._canonicalize(model, block, weights, context)
            if isinstance(outcome, Refused):
                refused.append(Refused(outcome.reason, outcome.value, index))
            fired += isinstance(outcome, Rewritten)
        return self.result(fired, sorted(refused, key=lambda each: -1 if each.block is None else each.block))

    def check(self, block: FFNBlock) -> Refused | None:
        """Only float weights, and nothing inside a linear that others read."""
        for linear in block.linears():
            reason = reason_against(block.graph, linear)
            if reason is not None:
                return Refused(reason, linear.output.name)
        return None

    def _canonicalize(self, model: Model, block: FFNBlock, weights: CanonicalWeights,
                      context: Context) -> Rewritten | Refused | None:
        block.settle()
        build = Builder(model, block.graph, block.name, block.onnx_type)
        core = core_of(block)
        if core is not None and can_be_whole(block, core) and self._whole(build, block, core, weights, context):
            return Rewritten()
        changed, kept = self._cut(build, block, weights), False
        for linear in block.linears():
            if producer(linear.output) is None:
                continue  # the cut took it along
            if self.all or not is_canonical(linear):
                if reemit(build, linear, weights):
                    changed = True
                elif self.all:
                    repeat(build, linear)
                    changed = True
                else:
                    kept = True
        if core is not None and core.nodes:
            changed |= self._core(build, block, core, context)
        if changed:
            return Rewritten()
        return Refused("a weight has another reader, or would take more room, so it stays as it is stored",
                       block.output.name) if kept else None

    def _whole(self, build: Builder, block: FFNBlock, core: Core, weights: CanonicalWeights, context: Context) -> bool:
        before = len(build.graph.nodes)
        y = emit_whole(build, block, core, weights, context)
        if y is None:
            return False
        made = list(build.graph.nodes[before:])
        rank = len(block.input.shape) if block.input.shape else 3
        own = executed_alone(build.model, block.nodes, block.output, block.onnx_type, rank, context)
        new = executed_alone(build.model, made, y, block.onnx_type, rank, context)
        if own is None or new is None or new >= own:
            remove_dead(build.graph, made)
            return False
        block.replace(y)
        return True

    def _cut(self, build: Builder, block: FFNBlock, weights: CanonicalWeights) -> bool:
        """Cut a fused gate-up by one Split."""
        cut = cut_of(block)
        if cut is None or (is_split(block, cut) and not self.all):
            return False
        if cut.halves is not None:
            values = split(build, cut.fused, cut.axis, cut.halves)
        else:
            ordered = self._ordered(build, block, cut, weights)
            if ordered is None:
                return False
            values = ordered
        for leaf, value in zip(block.region.leaves, values, strict=True):
            old = producer(leaf.tensor)
            take_over(leaf.tensor, value)
            remove_dead(build.graph, [old] if old is not None else [])
        return True

    def _ordered(self, build: Builder, block: FFNBlock, cut: Cut, weights: CanonicalWeights) -> list[gs.Tensor] | None:
        """The leaves of interleaved columns, from a weight whose columns are put in order."""
        linear = cut.linear
        cutters = {id(node) for node in block.region.nodes}
        if cut.fused is not linear.output or is_output(block.graph, linear.output) or linear.fused_activation is not None:
            return None
        if any(id(reader) not in cutters for reader in consumers(linear.output)):
            return None
        weight = weights.matrix(build, linear, cut.order)
        return None if weight is None else split(build, product(build, linear, linear.input, weight, cut.order), cut.axis, (0, 1))

    def _core(self, build: Builder, block: FFNBlock, core: Core, context: Context) -> bool:
        value = best_core(build, block, core, context, anew=self.all)
        if value is None and self.all:
            value = own_core(build, core, core.starts)
        if value is None:
            return False
        put(build, core, value)
        return True


