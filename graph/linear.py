"""One view over every node, or chain of nodes, that multiplies a value by a constant matrix.

MatMul, Gemm, FusedMatMul, FusedGemm, 1×1 Conv, Einsum, MatMulNBits, DynamicQuantizeMatMul, MatMulIntegerToFloat and the
MatMulInteger chain all read as ``y = act(x W + b)`` with ``W`` given as ``[d_in, d_out]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .broadcast import keeps_rank
from .constant import Array, Folded, fold
from .edit import consumers, producer
from .integer_casts import absorb_casts
from .nbits import dequantize_nbits
from .picked import picked
from .row_quantized import row_quantized
from .types import FLOATS

MICROSOFT = "com.microsoft"


@dataclass(eq=False)
class Linear:
    """A product with a constant matrix, whatever it is written as.

    Attributes:
        kind: the operator that multiplies.
        node: the node that multiplies.
        nodes: every node of the chain, from the quantization of the input to the bias.
        input: the value multiplied, ``[*, d_in]`` (features on ``axis``).
        output: the value after the bias, ``[*, d_out]``.
        d_in, d_out: widths.
        weight: loads the matrix, ``[d_in, d_out]`` (``[experts, d_in, d_out]`` if packed), in ``onnx_type``.
        bias: loads the bias ``[d_out]``, or None.
        onnx_type: element type of input and output.
        axis: where the features are, counted from the end: -1, or the channel axis of a Conv.
        source: the initializer (or Constant attribute) that holds the weight.
        quantized: the weight is stored as integers.
        experts: matrices packed in one weight. packed: the weight has a third axis for them, though it may be one matrix.
        gathered: the matrices are picked from the packed weight at run time.
        overridable: the weight is an input of the graph with a default.
        weight_key: equal for two linears that read the same weight in the same way; None where it has no initializer.
        fused_activation: the activation inside a FusedGemm or FusedConv, with its parameters.
    """

    kind: str
    node: gs.Node
    nodes: list[gs.Node]
    input: gs.Tensor
    output: gs.Tensor
    d_in: int
    d_out: int
    weight: Callable[[], Array]
    bias: Callable[[], Array] | None
    onnx_type: int
    axis: int = -1
    source: gs.Constant | None = None
    quantized: bool = False
    experts: int = 1
    packed: bool = False
    gathered: bool = False
    fused_activation: tuple[str, dict[str, Any]] | None = None
    overridable: bool = False
    weight_key: tuple[object, ...] | None = None

    @property
    def parameters(self) -> int:
        """Numbers in weight and bias."""
        return self.experts * (self.d_in * self.d_out + (self.d_out if self.bias is not None else 0))


def read_linear(node: gs.Node) -> Linear | None:
    """``node`` as a linear, with the bias added behind it, or None if it is none."""
    reader = _READERS.get((node.domain or "", node.op))
    linear = reader(node) if reader is not None else None
    if linear is not None:
        _absorb_bias(linear)
        if linear.kind in _INTEGER:
            absorb_casts(linear)
    return linear


def _matrix(folded: Folded | None, trans: bool = False) -> tuple[int, int, Callable[[], Array]] | None:
    if folded is None or len(folded.shape) not in (2, 3) or folded.onnx_type not in FLOATS:
        return None
    load = folded.load
    if trans:
        return folded.shape[-1], folded.shape[-2], lambda: load().swapaxes(-1, -2)
    return folded.shape[-2], folded.shape[-1], load


def _scaled(load: Callable[[], Array], factor: float) -> Callable[[], Array]:
    return load if factor == 1 else lambda: (load() * factor).astype(load().dtype)


def _plain(node: gs.Node, x: gs.Tensor, weight: gs.Tensor, trans: bool, alpha: float = 1.0,
           axis: int = -1) -> Linear | None:
    folded = fold(weight)
    gathered = False
    if folded is None:
        folded, gathered = picked(weight), True
    matrix = _matrix(folded, trans)
    if matrix is None or folded is None or (gathered and len(folded.shape) != 3):
        return None
    d_in, d_out, load = matrix
    experts = folded.shape[0] if len(folded.shape) == 3 else 1
    return Linear(node.op, node, [node], x, node.outputs[0], d_in, d_out, _scaled(load, alpha), None,
                  folded.onnx_type, axis=axis, source=folded.sources[0] if folded.sources else None,
                  quantized=folded.quantized, experts=experts, packed=len(folded.shape) == 3, gathered=gathered,
                  overridable=folded.overridable, weight_key=_weight_key(folded, weight, trans))


def _weight_key(folded: Folded, weight: gs.Tensor, trans: bool) -> tuple[object, ...] | None:
    if not folded.sources:
        return None
    ops = tuple(node.op for node in folded.nodes)
    cut = id(weight) if {"Gather", "Slice", "Concat", "MatMul"} & set(ops) else 0
    return (id(folded.sources[0]), ops, trans, cut)


def _matmul(node: gs.Node) -> Linear | None:
    """``x W``, or ``W x`` with a packed weight and the features of x in a column, as batched experts are written."""
    linear = _plain(node, node.inputs[0], node.inputs[1], False)
    if linear is None:
        linear = _plain(node, node.inputs[1], node.inputs[0], True, axis=-2)
        if linear is None or (not linear.gathered and linear.experts == 1):
            return None
        for value in (linear.input, linear.output):  # a matrix for each row, so three axes
            value.shape = value.shape or [None] * 3
    return linear


def _fused_matmul(node: gs.Node) -> Linear | None:
    attrs = node.attrs
    if attrs.get("transA", 0) or attrs.get("transBatchA", 0) or attrs.get("transBatchB", 0):
        return None
    return _plain(node, node.inputs[0], node.inputs[1], bool(attrs.get("transB", 0)), float(attrs.get("alpha", 1.0)))


def _gemm(node: gs.Node) -> Linear | None:
    attrs = node.attrs
    x = node.inputs[0]
    if attrs.get("transA", 0):
        turned = producer(x)
        if turned is None or turned.op != "Transpose":
            return None
        x = turned.inputs[0]
    linear = _plain(node, x, node.inputs[1], bool(attrs.get("transB", 0)), float(attrs.get("alpha", 1.0)))
    if linear is None or linear.packed:
        return None
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = _vector(node.inputs[2], linear.d_out)
        if bias is None:
            return None
        linear.bias = _scaled(bias, float(attrs.get("beta", 1.0)))
    if node.op == "FusedGemm" and attrs.get("activation"):
        linear.fused_activation = (attrs["activation"], {key: value for key, value in attrs.items()
                                                         if key.startswith("activation_")})
    return linear


def _vector(tensor: gs.Tensor, width: int) -> Callable[[], Array] | None:
    """Loads a constant that broadcasts as one number a feature (or one for all), as ``[width]``."""
    folded = fold(tensor)
    if folded is None:
        return None
    size = int(np.prod(folded.shape, dtype=np.int64))
    if size not in (1, width) or (size == width and size != 1 and (not folded.shape or folded.shape[-1] != width)):
        return None
    return lambda: np.broadcast_to(folded.load().reshape(-1), (width,)).copy()


def _conv(node: gs.Node) -> Linear | None:
    folded = fold(node.inputs[1])
    if folded is None or len(folded.shape) not in (3, 4) or set(folded.shape[2:]) != {1}:
        return None
    attrs = node.attrs
    if attrs.get("group", 1) != 1 or set(attrs.get("strides", [1])) != {1} or any(attrs.get("pads", [0])):
        return None
    if len(node.inputs) > 3 or folded.onnx_type not in FLOATS:
        return None
    d_out, d_in = folded.shape[:2]
    bias = None
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = _vector(node.inputs[2], d_out)
        if bias is None:
            return None
    linear = Linear(node.op, node, [node], node.inputs[0], node.outputs[0], d_in, d_out,
                    lambda: folded.load().reshape(d_out, d_in).T, bias, folded.onnx_type, axis=1 - len(folded.shape),
                    source=folded.sources[0] if folded.sources else None, quantized=folded.quantized)
    if node.op == "FusedConv" and attrs.get("activation"):
        linear.fused_activation = (attrs["activation"], dict(attrs))
    return linear


def _einsum(node: gs.Node) -> Linear | None:
    """``...i,io->...o`` and ``...i,oi->...o`` in any letters; ``...i,eio->...e...o`` with the experts' weights packed."""
    equation = str(node.attrs.get("equation", "")).replace(" ", "")
    if "->" not in equation or len(node.inputs) != 2:
        return None
    left, result = equation.split("->")
    x, w = left.split(",")
    if len(w) not in (2, 3) or "." in w or len(set(w)) != len(w):
        return None
    trans = x[-1:] == w[-1] and w[-2] == result[-1:]
    if not trans and (x[-1:] != w[-2] or w[-1] != result[-1:]):
        return None
    expert = w[:-2]
    rows = x[:-1].replace(expert, "") if expert else x[:-1]
    if rows != (result[:-1].replace(expert, "") if expert else result[:-1]) or set(w[-2:]) & set(rows):
        return None
    if expert and expert not in result[:-1]:
        return None  # summed over the experts
    linear = _plain(node, node.inputs[0], node.inputs[1], trans)
    return linear if linear is None or (linear.experts != 1) == bool(expert) else None


def _nbits(node: gs.Node) -> Linear | None:
    parts = [fold(tensor) if tensor.name else None for tensor in node.inputs[1:5]]
    if parts[0] is None or parts[1] is None or (len(parts) > 3 and parts[3] is not None):
        return None
    packed, scales = parts[0], parts[1]
    zeros = parts[2] if len(parts) > 2 else None
    d_in, d_out = int(node.attrs["K"]), int(node.attrs["N"])
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
    bias = None
    if len(node.inputs) > 5 and node.inputs[5].name:
        bias = _vector(node.inputs[5], d_out)
    return Linear(node.op, node, [node], node.inputs[0], node.outputs[0], d_in, d_out,
                  lambda: dequantize_nbits(packed.load(), scales.load(), zeros.load() if zeros else None,
                                           d_in, d_out, bits, block),
                  bias, scales.onnx_type, source=packed.sources[0] if packed.sources else None, quantized=True)


def _integer_weight(weight: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None) -> tuple[Folded, Callable[[], Array]] | None:
    stored, scales = fold(weight), fold(scale)
    zeros = fold(zero) if zero is not None and zero.name else None
    if stored is None or scales is None or len(stored.shape) != 2:
        return None

    def load() -> Array:
        shift = zeros.load().astype(np.float32).reshape(-1) if zeros else np.float32(0)
        result: Array = (stored.load().astype(np.float32) - shift) * scales.load().reshape(-1)
        return result

    return stored, load


def _integer(node: gs.Node, x: gs.Tensor, nodes: list[gs.Node], weight: tuple[Folded, Callable[[], Array]] | None,
             output: gs.Tensor, bias: gs.Tensor | None) -> Linear | None:
    if weight is None:
        return None
    stored, load = weight
    d_in, d_out = stored.shape
    vector = _vector(bias, d_out) if bias is not None and bias.name else None
    if bias is not None and bias.name and vector is None:
        return None
    return Linear(node.op, node, nodes, x, output, d_in, d_out, load, vector, onnx.TensorProto.FLOAT,
                  source=stored.sources[0] if stored.sources else None, quantized=True)


def _input(node: gs.Node, index: int) -> gs.Tensor | None:
    return node.inputs[index] if index < len(node.inputs) and node.inputs[index].name else None


def _dynamic_quantize_matmul(node: gs.Node) -> Linear | None:
    weight = _integer_weight(node.inputs[1], node.inputs[2], _input(node, 3))
    return _integer(node, node.inputs[0], [node], weight, node.outputs[0], _input(node, 4))


def _integer_to_float(node: gs.Node) -> Linear | None:
    quantize = producer(node.inputs[0])
    weight = _integer_weight(node.inputs[1], node.inputs[3], _input(node, 5))
    by_row = row_quantized(node)
    if by_row is not None:
        return _integer(node, by_row.input, [*by_row.before, node, *by_row.after], weight, by_row.output, _input(node, 6))
    if quantize is None or quantize.op != "DynamicQuantizeLinear":
        return None
    return _integer(node, quantize.inputs[0], [quantize, node], weight, node.outputs[0], _input(node, 6))


def _matmul_integer(node: gs.Node) -> Linear | None:
    """DynamicQuantizeLinear → MatMulInteger → Cast → Mul by (scale of x · scale of W), as ``quantize_dynamic`` writes it."""
    quantize = producer(node.inputs[0])
    if quantize is None or quantize.op != "DynamicQuantizeLinear":
        return None
    cast = _only(node.outputs[0], "Cast")
    multiply = _only(cast.outputs[0], "Mul") if cast is not None else None
    if multiply is None or cast is None:
        return None
    scales = next((tensor for tensor in multiply.inputs if tensor is not cast.outputs[0]), None)
    product = producer(scales) if scales is not None else None
    if product is None or product.op != "Mul" or not any(t is quantize.outputs[1] for t in product.inputs):
        return None
    scale = next((tensor for tensor in product.inputs if tensor is not quantize.outputs[1]), None)
    if scale is None:
        return None
    weight = _integer_weight(node.inputs[1], scale, _input(node, 3))
    nodes = [quantize, node, product, cast, multiply]
    x, y = quantize.inputs[0], multiply.outputs[0]
    divide, rows = producer(x), _only(y, "Mul")
    if divide is not None and divide.op == "Div" and rows is not None:  # y = r · ((x / r) W)
        scale_of_rows = next((tensor for tensor in rows.inputs if tensor is not y), None)
        if scale_of_rows is divide.inputs[1] and fold(divide.inputs[1]) is None:
            nodes, x, y = [divide, *nodes, rows], divide.inputs[0], rows.outputs[0]
    return _integer(node, x, nodes, weight, y, None)


def _only(tensor: gs.Tensor, op: str) -> gs.Node | None:
    readers = consumers(tensor)
    return readers[0] if len(readers) == 1 and readers[0].op == op else None


def _absorb_bias(linear: Linear) -> None:
    """Take the Add of a constant right behind the product (through a Reshape of the leading axes) as its bias."""
    if linear.bias is not None or linear.fused_activation is not None or linear.axis != -1:
        return
    add = _only(linear.output, "Add")
    if add is None or linear.experts != 1:
        return
    other = add.inputs[1] if add.inputs[0] is linear.output else add.inputs[0]
    bias = _vector(other, linear.d_out) if other is not linear.output else None
    folded = fold(other)
    if bias is None or folded is None or folded.shape[-1:] != (linear.d_out,) or any(
            dim != 1 for dim in folded.shape[:-1]) or not keeps_rank(linear.output, folded.shape, add.outputs[0]):
        return
    linear.bias = bias
    linear.nodes.append(add)
    linear.output = add.outputs[0]


_INTEGER = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
_READERS: dict[tuple[str, str], Callable[[gs.Node], Linear | None]] = {
    ("", "MatMul"): _matmul, ("", "Gemm"): _gemm, ("", "Conv"): _conv, ("", "Einsum"): _einsum,
    ("", "MatMulInteger"): _matmul_integer,
    (MICROSOFT, "FusedMatMul"): _fused_matmul, (MICROSOFT, "FusedGemm"): _gemm, (MICROSOFT, "FusedConv"): _conv,
    (MICROSOFT, "MatMulNBits"): _nbits, (MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_quantize_matmul,
    (MICROSOFT, "MatMulIntegerToFloat"): _integer_to_float,
}
