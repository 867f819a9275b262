"""quantize-ffn: FFN weights to int8."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..graph.ffn import FFNBlock
from ..graph.model import Model
from .base import BlockPass, Context, Refused, Rewritten
from .dynamic_int8 import quantize_block
from .weight_only_int8 import quantize_weights


@dataclass(frozen=True)
class QuantizeFFN(BlockPass):
    """Store the weights of FFN blocks as int8, one scale per output column, and multiply in integers where that pays.

        Ŵ[i, j] = round(W[i, j] / s[j]),  s[j] = max_i |W[i, j]| / 127

    ``form=dynamic`` (CPU) quantizes the activations too, at run time, one scale for the tensor:
    DynamicQuantizeLinear → MatMulInteger → Cast → Mul, which ONNX Runtime fuses. Since that one scale is ruined by a single
    outlier token, ``row_scale`` divides each row by its largest magnitude first, which is exact algebra:

        r = max |x| over the last axis,   y = r · ((x / r) W)

    Behind an ungated GELU or SiLU, whose values never fall below −0.28, r = max(max h, 0.28) saves a pass over h.
    Linears that read the same value share one r and one quantization.

    ``form=weight-only`` (CUDA, and one token at a time) keeps the activations in float: DequantizeLinear in front of the
    MatMul, which ONNX Runtime turns into MatMulNBits.

    Convolutions and packed experts have no integer kernel of this kind: they get ``weight-only`` whatever the form.
    Does not fire on weights that are stored as integers already, that the caller may override, or that are not finite.

    Source: ONNX operators DynamicQuantizeLinear, MatMulInteger, DequantizeLinear; row scaling: arXiv 2208.07339 (vector-wise
    quantization).
    """

    name: ClassVar[str] = "quantize-ffn"
    exact: ClassVar[bool] = False
    form: Literal["dynamic", "weight-only"] = field(default="dynamic", metadata={"help": "integer kernels, or storage only"})
    row_scale: bool = field(default=True, metadata={"help": "scale each row of the activations by its own maximum"})
    reduced_range: bool = field(default=False, metadata={
        "help": "7-bit weights, for CPUs without VNNI, where sums of int8 products saturate"})

    def check(self, block: FFNBlock) -> Refused | None:
        """Only float weights that stay what they are."""
        if block.quantized:
            return Refused("its weights are stored as integers already", block.output.name)
        if any(linear.overridable for linear in block.linears()):
            return Refused("its weights are inputs of the graph, which the caller may override", block.output.name)
        if any(linear.fused_activation for linear in block.linears()):
            return Refused("an activation is fused into its projection", block.output.name)
        return None

    def rewrite(self, model: Model, block: FFNBlock, statistics: object, context: Context) -> Rewritten | Refused:
        """Quantize the linears of one block."""
        whole = block.axis == -1 and all(linear.experts == 1 and not linear.gathered and linear.axis == -1
                                         for linear in block.linears())
        largest = 63 if self.reduced_range else 127
        if self.form == "dynamic" and whole:
            if model.opset < 11:
                return Refused(f"DynamicQuantizeLinear needs opset 11, the model has {model.opset}", block.output.name)
            return quantize_block(model, block, self.row_scale, largest, context.memo)
        return quantize_weights(model, block, largest)
