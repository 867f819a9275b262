"""to-half: a model in float32 as one in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import onnx

from ..graph.linear import read_linear
from ..graph.model import Model
from ..graph.norm import read_norm
from ..graph.tensors import tensors
from ..runtime.load import is_missing_kernel, load_complaint
from .base import Context, Pass, PassResult, Refused
from .exact.norm_fusion import is_fused
from .half.half_graph import HalfGraph, convert
from .half.half_weights import beyond
from .half.size_arithmetic import sizes

_KIND = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class ToHalf(Pass):
    """Store and compute in 16 bits what is in float32.

        W ≈ half(W),  y ≈ float32(f(half(x)))

    Which node computes in what, and the Casts between, are decided by ONNX Runtime's own converter
    (``onnxruntime.transformers.float16``). Inputs and outputs keep their types. In float32 stay: the operators that the converter
    keeps there, those with no form in 16 bits, integer products and what is around them, sizes that are computed as numbers
    (float16 holds whole numbers up to 2048 only), norms that are written out and that ONNX Runtime does not fuse (their squares
    overflow float16 from 256 on), and what ``keep`` names. Weights are converted a
    tile at a time when they are written; numbers beyond 65504 become 65504, and the report says how many.

    Does not fire on a model without float32 weights, on one that the converter fails on, or where ONNX Runtime does not load
    the result: bfloat16 has no kernels on the CPU, so it needs ``--provider cuda``.

    Source: ONNX Runtime, onnxruntime/transformers/float16.py; bfloat16: the same graph with the other type.
    """

    name: ClassVar[str] = "to-half"
    exact: ClassVar[bool] = False
    dtype: Literal["float16", "bfloat16"] = field(default="float16", metadata={"help": "the type"})
    keep: str = field(default="", metadata={
        "help": "operators, or names of nodes, that stay in float32, e.g. Softmax+/layer.0/mlp/Gelu"})
    norms: Literal["auto", "float32", "half"] = field(default="auto", metadata={
        "help": "norms that are written out: in float32 where ONNX Runtime does not fuse them, always, or never"})

    def run(self, model: Model, context: Context) -> PassResult:
        """Convert the whole model."""
        proto, values = model.to_proto()
        found = [tensor for tensor, _ in tensors(proto) if tensor.data_type == onnx.TensorProto.FLOAT]
        if not found:
            return self.result(0, [Refused("it has no weights in float32")])
        if self.dtype == "bfloat16" and any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor, _ in tensors(proto)):
            return self.result(0, [Refused("it has weights in float16 already, which bfloat16 cannot be mixed with")])
        keep = {word for word in self.keep.split("+") if word}
        operators = keep & {node.op_type for node in proto.graph.node}
        nodes = {*keep - operators, *self._norm_values(model, context), *_integer_values(model), *sizes(model)}
        half = convert(proto, values, _KIND[self.dtype], operators, nodes)
        if isinstance(half, str):
            return self.result(0, [Refused(half)])
        trial = model.copy()
        trial.replace(half.proto, {**values, **half.values})
        complaint = load_complaint(trial)
        if complaint is not None and not (context.provider == "cuda" and is_missing_kernel(complaint)):
            return self.result(0, [Refused(f"ONNX Runtime does not load what comes out ({complaint})")])
        model.replace(half.proto, {**values, **half.values})
        context.memo.clear()  # what other passes made belongs to the graph that is gone
        return self.result(1, [], self._notes(half))

    def _notes(self, half: HalfGraph) -> list[str]:
        clipped = sum(beyond(values) for values in half.converted) if self.dtype == "float16" else 0
        return [f"{clipped} numbers in its weights lie beyond 65504 and became 65504"] if clipped else []

    def _norm_values(self, model: Model, context: Context) -> Iterator[str]:
        """A value of every node of the norms that stay in float32."""
        if self.norms == "half":
            return
        for path, graph in model.graphs():
            for node in graph.nodes:
                norm = read_norm(node) if node.outputs else None
                if norm is None or not norm.written_out:
                    continue
                if self.norms == "float32" or path != "main" or not is_fused(model, norm, context):
                    yield from (part.outputs[0].name for part in norm.nodes)


def _integer_values(model: Model) -> Iterator[str]:
    """A value of every node around an integer product. Weights in blocks (MatMulNBits) are for 16 bits too."""
    for _, graph in model.graphs():
        for node in graph.nodes:
            linear = read_linear(node)
            if linear is None or not linear.quantized or linear.kind == "MatMulNBits":
                continue
            if linear.kind in ("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul") or model.opset < 19:
                yield from (part.outputs[0].name for part in linear.nodes)
