"""quantize-ffn: weights of FFN blocks, and of other linears, to integers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..graph.block import FFNBlock
from ..graph.model import Model
from ..runtime.processor import products_saturate
from .base import BlockPass, Context, PassResult, Refused
from .int8.form_choice import NEVER_SLOWER, fastest_form, parse_shapes
from .int8.keep_float import worst_blocks
from .int8.linear_groups import block_groups
from .int8.other_linears import NO_HEAD, other_groups
from .int8.quantize_unit import Form, Recipe, quantize_units, smooth_units
from .int8.units import Unit, doubled, tied, units_of
from .int8.weight_codes import Rounding

_BLOCK = {4: 32, 8: 128}
_BLOCKED = 21  # opset from which on DequantizeLinear has a block_size
_STRENGTH = {"norm": 1.0, "feeds": 0.7}


@dataclass(frozen=True)
class QuantizeFFN(BlockPass):
    """Store weights as integers with a scale for each output column, and multiply in integers where that pays.

        Ŵ[i, j] = round(W[i, j] / s[j]),  s[j] = max_i |W[i, j]| / 127

    ``form=dynamic`` (``target=cpu``) quantizes the activations too, at run time, with one scale for the tensor:
    DynamicQuantizeLinear → MatMulInteger → Cast → Mul, which ONNX Runtime fuses, bias and all. That one scale is ruined by an
    outlier channel or an outlier token, so

        x W = (x / s) (diag(s) W)                           channels (``smooth``): SmoothQuant, arXiv 2211.10438
        x W = r · ((x / r) W),  r = max |x| of each row     tokens (``row_scale``): vector-wise quantization, arXiv 2208.07339

    both exact algebra. ``smooth=norm`` knows the channels of a post-LN residual stream from the scale and shift of its
    LayerNorm, without any input; ``smooth=feeds`` measures them everywhere. ``row_scale=auto`` spends rows where the feeds show
    that one scale for the tensor would cost a row more than 5 % of its signal; without feeds where channels were not smoothed,
    and on the down projections: behind an ungated activation that never falls far below zero r = max(max h,
    floor) needs no |h|, and as x / r lies in a known range, its quantization is a constant and needs no search for the largest
    and smallest number. Linears that read the same value share one quantization.

    ``form=nbits`` (``target=cuda``, ``bits=4``) writes MatMulNBits: 4 or 8 bits, a scale for each block of inputs.
    ``form=weight-only`` writes DequantizeLinear in front of the MatMul, standard operators for any runtime.

    Convolutions and packed experts have no integer kernel of this kind: they get ``weight-only`` whatever the form, with 8 bits.
    Does not fire on weights that are stored as integers already, that the caller may override, or that are not finite.

    Source: ONNX operators DynamicQuantizeLinear, MatMulInteger, QuantizeLinear, DequantizeLinear; ONNX Runtime operators
    MatMulIntegerToFloat, MatMulNBits.
    """

    name: ClassVar[str] = "quantize-ffn"
    exact: ClassVar[bool] = False
    target: Literal["cpu", "cuda", "auto"] = field(default="cpu", metadata={
        "help": "what picks the form; auto races the forms here, and leaves the model alone where none is faster"})
    form: Literal["by-target", "dynamic", "nbits", "weight-only"] = field(default="by-target", metadata={
        "help": "integer kernels, blocks of integers, or storage only"})
    bits: Literal[8, 4] = field(default=8, metadata={"help": "of a stored weight"})
    block_size: int | None = field(default=None, metadata={"help": "inputs that share a scale, for nbits and weight-only"})
    also: Literal["nothing", "attention", "head", "everything"] = field(default="nothing", metadata={
        "help": "other linears too: those of attention, the head that gives logits, or both"})
    row_scale: Literal["auto", "true", "false"] = field(default="auto", metadata={
        "help": "scale each row of the activations by its own maximum: where it pays, everywhere, nowhere"})
    smooth: Literal["norm", "feeds", "none"] = field(default="norm", metadata={
        "help": "take large channels out of the activations, known from the norm or from feeds"})
    strength: float | None = field(default=None, metadata={"help": "of smoothing, 0 to 1"})
    scale: Literal["max", "percentile", "mse"] = field(default="max", metadata={"help": "what a scale is taken from"})
    percentile: float = field(default=99.9, metadata={"help": "for scale=percentile"})
    bias_correction: bool = field(default=False, metadata={"help": "take the mean error out of the bias (feeds)"})
    gptq: bool = field(default=False, metadata={"help": "let later roundings undo the error of earlier ones (feeds)"})
    keep_float: float | None = field(default=None, metadata={
        "help": "leave the blocks in float that alone cost most: how many, or (below 1) from which rel_l2 of an output on"})
    shapes: str = field(default="", metadata={
        "help": "for target=auto: sizes of the open dimensions of the inputs, e.g. 1x1+8x128; else as the feeds are"})
    reduced_range: Literal["auto", "true", "false"] = field(default="auto", metadata={
        "help": "7-bit weights, where sums of int8 products saturate: x86 without VNNI"})

    def __post_init__(self) -> None:
        """Check that the options fit together.

        Raises:
            ValueError: they do not.
        """
        if self.form == "dynamic" and self.bits == 4:
            raise ValueError("form=dynamic has kernels for 8 bits only: leave the form out, or take form=nbits")
        if self.form == "weight-only" and self.bits == 4:
            raise ValueError("form=weight-only has 8 bits: for 4 take form=nbits")
        if self.block_size is not None and self._form == "dynamic":
            raise ValueError("form=dynamic has one scale for a column: block_size is for form=nbits and form=weight-only")
        if self.block_size is not None and (self.block_size < 16 or self.block_size & (self.block_size - 1)):
            raise ValueError(f"block_size={self.block_size}: take a power of two from 16 on")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength}: lies between 0 and 1")
        if self.keep_float is not None and (self.keep_float <= 0 or (self.keep_float > 1 and self.keep_float % 1)):
            raise ValueError(f"keep_float={self.keep_float}: a number of blocks, or a drift below 1")
        if self.shapes:
            parse_shapes(self.shapes)
        if not 50 <= self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile}: lies between 50 and 100")

    @property
    def _form(self) -> Form:
        if self.form != "by-target":
            return self.form
        return "nbits" if self.bits == 4 or self.target == "cuda" else "dynamic"

    @property
    def needs_feeds(self) -> bool:
        """Where something is measured."""
        return self.smooth == "feeds" or self.bias_correction or self.gptq or self.keep_float is not None

    def check(self, block: FFNBlock) -> Refused | None:
        """Only float weights that stay what they are."""
        if block.quantized:
            return Refused("its weights are stored as integers already", block.output.name)
        if any(linear.overridable for linear in block.linears()):
            return Refused("its weights are inputs of the graph, which the caller may override", block.output.name)
        if any(linear.fused_activation for linear in block.linears()):
            return Refused("an activation is fused into its projection", block.output.name)
        return None

    def run(self, model: Model, context: Context) -> PassResult:
        """Quantize the chosen blocks, and the other linears where they are asked for."""
        if self.target == "auto":
            return self._raced(model, context)
        recipe, said = self._recipe()
        notes: list[str] = []
        blocks, refused = self._chosen(model, context)
        units, others = self._units(model, blocks, context)
        refused += others
        if self.also == "head" and not others and all(unit.blocks for unit in units):
            notes.append(NO_HEAD)
        reason = self._too_old(model, recipe)
        if reason is not None:
            refused += [each for unit in units for each in unit.refused(reason)]
            units = []
        stored = {index for unit in units if not unit.plain for index in unit.blocks}
        known = smooth_units(model, units, recipe, context)
        done: list[Unit] = []
        for unit, refusal in quantize_units(model, units, recipe, context, known):
            context.progress(f"{self.name}: {unit.groups[0].name}")
            if refusal is None:
                done.append(unit)
            else:
                refused += unit.refused(refusal)
        left = {each.block for each in refused}
        quantized = {index: blocks[index] for unit in done for index in unit.blocks if index not in left}
        notes += doubled(quantized, {index: block for index, block in context.ledger.blocks.items() if index not in quantized})
        return self._told(done, refused, (said if done else []) + notes + self._coarser(len(stored & set(quantized))))

    def _too_old(self, model: Model, recipe: Recipe) -> str | None:
        """Why the form cannot be written in the opset of ``model``; None where it can."""
        needed = {"dynamic": 11, "nbits": 1, "weight-only": 10}[recipe.form]
        if model.opset < needed:
            return f"the form needs opset {needed}, the model has {model.opset}"
        if recipe.form == "weight-only" and recipe.rounding.block is not None and model.opset < _BLOCKED:
            return f"the form with a block_size needs opset {_BLOCKED}, the model has {model.opset}: leave block_size out"
        return None

    def _told(self, done: list[Unit], refused: list[Refused], notes: list[str]) -> PassResult:
        """What was done, counted in blocks and in values that other linears read; each block refused once."""
        once: dict[object, Refused] = {}
        for each in refused:
            once.setdefault(each.value if each.block is None else each.block, each)
        blocks = {index for unit in done for index in unit.blocks} - set(once)
        others = sum(not unit.blocks for unit in done)
        ordered = sorted(once.values(), key=lambda each: -1 if each.block is None else each.block)
        return self.result(len(blocks) + others, ordered, notes)

    def _coarser(self, stored: int) -> list[str]:
        """A sentence where ``stored`` blocks got more bits or longer blocks than were asked for."""
        if not stored or (self.bits == 8 and self.block_size is None):
            return []
        return [f"{stored} of the blocks are convolutions or packed experts: their weights have 8 bits and one scale a column, "
                "as there is no kernel for less"]

    def _raced(self, model: Model, context: Context) -> PassResult:
        """The fastest form that is never slower than the input, done; or nothing."""
        blocks, refused = self._free(context)
        units, others = self._units(model, blocks, context)
        refused += others
        if not units:
            return self._told([], refused, [])
        forms: list[Form] = ["nbits"] if self.bits == 4 or self.block_size else ["dynamic", "nbits"]
        if self.form != "by-target":
            forms = [self.form]
        elif context.provider == "cuda":
            forms = ["nbits"] if self.bits == 4 else ["nbits", "weight-only"]
        plain = dataclasses.replace(self, target="cuda" if context.provider == "cuda" else "cpu", shapes="")
        candidates = {form: dataclasses.replace(plain, form=form) for form in forms}
        choice = fastest_form(model, {form: dataclasses.replace(each, keep_float=None) for form, each in candidates.items()},
                              blocks, parse_shapes(self.shapes) if self.shapes else [], context)
        if choice.form is None:
            reason = f"no form is sure to be at least {NEVER_SLOWER} times as fast as the input on every shape here"
            return self._told([], refused + [each for unit in units for each in unit.refused(reason)], choice.notes)
        result = candidates[choice.form].run(model, context)
        return self.result(result.fired, result.refused, [*choice.notes, *result.notes])

    def _free(self, context: Context) -> tuple[dict[int, FFNBlock], list[Refused]]:
        """The blocks asked for that can be quantized, by index, and why the others cannot."""
        blocks, refused = self.able(context, settled=True)
        return self._apart(blocks, refused, context)

    def _apart(self, blocks: dict[int, FFNBlock], refused: list[Refused],
               context: Context) -> tuple[dict[int, FFNBlock], list[Refused]]:
        """``blocks`` without those that run a projection of a block which is not among them."""
        there = context.ledger.blocks
        bound = tied(blocks, {index: there[index] for index in there if index not in blocks})
        reasons = [Refused(f"it runs a projection of block {other}, which stays as it is", blocks[index].output.name, index)
                   for index, other in bound.items()]
        return {index: block for index, block in blocks.items() if index not in bound}, [*refused, *reasons]

    def _chosen(self, model: Model, context: Context) -> tuple[dict[int, FFNBlock], list[Refused]]:
        """The blocks to quantize, without those that ``keep_float`` leaves alone, and why the others are not among them."""
        blocks, refused = self._free(context)
        if self.keep_float is None or not blocks:
            return blocks, refused
        worst = worst_blocks(model, dataclasses.replace(self, keep_float=None), blocks, self.keep_float, context)
        refused += [Refused(f"kept in float: alone it moves an output by rel_l2 {worst[index]:.2g}", block.output.name, index)
                    for index, block in blocks.items() if index in worst]
        return self._apart({index: block for index, block in blocks.items() if index not in worst}, refused, context)

    def _recipe(self) -> tuple[Recipe, list[str]]:
        """What the options come to on this machine, and sentences about it."""
        notes = []
        largest = 127 if self.bits == 8 else 7
        form = self._form
        block = (self.block_size or _BLOCK[self.bits]) if form == "nbits" else self.block_size
        if form == "dynamic":
            narrow = self.reduced_range == "true"
            if self.reduced_range == "auto" and products_saturate():
                narrow = True
                notes.append("this processor has no VNNI: weights of 7 bits, as sums of int8 products saturate "
                             "(reduced_range=false for a processor that has it)")
            largest = 63 if narrow else 127
        strength = self.strength if self.strength is not None else _STRENGTH.get(self.smooth, 1.0)
        rounding = Rounding(largest, self.bits, block, self.scale, self.percentile)
        return Recipe(form, rounding, self.row_scale, self.smooth, strength, self.gptq, self.bias_correction,
                      self.target != "cuda"), notes

    def _units(self, model: Model, blocks: dict[int, FFNBlock], context: Context) -> tuple[list[Unit], list[Refused]]:
        """What is to be quantized of ``blocks`` and, where asked for, of other linears, and which of those are left alone."""
        groups = [group for block in blocks.values() for group in block_groups(block)]
        refused: list[Refused] = []
        if self.also != "nothing":
            others, refused = other_groups(model, context.ledger.blocks.values(), self.also)
            groups += others
        return units_of(groups, blocks), refused
