"""Values quantized with a scale for each row, as ``quantize-ffn`` writes it around MatMulIntegerToFloat."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from .constant import fold, scalar
from .edit import consumers, producer


@dataclass(frozen=True)
class RowQuantized:
    """``y = r · ((x / r) W)`` around an integer product.

    Attributes:
        input, output: x and y.
        before, after: the nodes in front of the product and behind it, in order.
    """

    input: gs.Tensor
    output: gs.Tensor
    before: list[gs.Node]
    after: list[gs.Node]


def row_quantized(product: gs.Node) -> RowQuantized | None:
    """What is around ``product``, a MatMulIntegerToFloat, if its input is quantized row by row.

        QuantizeLinear(x / r, s, z) → product with the scale s → · r
        QuantizeLinear(x, s, z), s a scale for each row → product with the scale 1 → · s            (opset 21)
    """
    quantize = producer(product.inputs[0])
    if quantize is None or quantize.op != "QuantizeLinear":
        return None
    readers = consumers(product.outputs[0])
    if len(readers) != 1 or readers[0].op != "Mul":
        return None
    rows = next((tensor for tensor in readers[0].inputs if tensor is not product.outputs[0]), None)
    if rows is None or fold(rows) is not None:
        return None
    if quantize.inputs[1] is rows:
        if scalar(product.inputs[2]) != 1:
            return None
        return RowQuantized(quantize.inputs[0], readers[0].outputs[0], [quantize], readers)
    divide = producer(quantize.inputs[0])
    if divide is None or divide.op != "Div" or divide.inputs[1] is not rows or quantize.inputs[1] is not product.inputs[2]:
        return None
    return RowQuantized(divide.inputs[0], readers[0].outputs[0], [divide, quantize], readers)
