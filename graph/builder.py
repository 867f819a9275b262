"""Adds nodes to a view so that the code reads like the graph it makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .linear import MICROSOFT
from .model import Model
from .pointwise import Array
from .types import numpy_type
from .weights import InlineValues, Values


class Builder:
    """Builds nodes in one graph of a model, in one element type.

    Args:
        model: gives names and the opset.
        graph: the view that the nodes go into.
        prefix: begins every new name, e.g. ``/layer.3/ffn``.
        onnx_type: element type of the floating-point constants made.
    """

    def __init__(self, model: Model, graph: gs.Graph, prefix: str, onnx_type: int = onnx.TensorProto.FLOAT) -> None:
        self.model = model
        self.graph = graph
        self.prefix = prefix.rstrip("/")
        self.onnx_type = onnx_type

    def value(self, hint: str) -> gs.Variable:
        """A new value named after ``hint``."""
        return gs.Variable(self.model.names.fresh(f"{self.prefix}/{hint}"))

    def constant(self, values: Array | Values, hint: str) -> gs.Constant:
        """A new initializer. Floating-point arrays become the builder's type; others keep theirs."""
        if isinstance(values, np.ndarray):
            if values.dtype.kind == "f" or values.dtype == numpy_type(self.onnx_type):
                values = values.astype(numpy_type(self.onnx_type))
            values = InlineValues(values)
        constant = gs.Constant(self.model.names.fresh(f"{self.prefix}/{hint}"), values)
        constant.home, constant.was_used = self.graph, True
        return constant

    def constant_as(self, array: Array, onnx_type: int, hint: str) -> gs.Constant:
        """A new initializer of the element type given."""
        constant = gs.Constant(self.model.names.fresh(f"{self.prefix}/{hint}"),
                               InlineValues(np.asarray(array).astype(numpy_type(onnx_type))))
        constant.home, constant.was_used = self.graph, True
        return constant

    def number(self, value: float, hint: str) -> gs.Constant:
        """A new scalar initializer in the builder's type."""
        return self.constant(np.asarray(value, np.float64), hint)

    def integers(self, values: list[int], hint: str) -> gs.Constant:
        """A new int64 list."""
        return self.constant(np.asarray(values, np.int64), hint)

    def nodes(self, op: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], *, domain: str = "", hint: str = "",
              **attrs: Any) -> gs.Node:
        """A new node with the outputs given."""
        node = gs.Node(op, name=self.model.names.fresh(f"{self.prefix}/{hint or op}"), attrs=attrs, inputs=inputs,
                       outputs=outputs, domain=domain or None)
        self.graph.nodes.append(node)
        return node

    def op(self, op: str, *inputs: gs.Tensor, hint: str = "", domain: str = "", **attrs: Any) -> gs.Variable:
        """A new node with one output, which is returned."""
        output = self.value(f"{hint or op}_output")
        self.nodes(op, list(inputs), [output], domain=domain, hint=hint, **attrs)
        return output

    def contrib(self, op: str, *inputs: gs.Tensor, hint: str = "", **attrs: Any) -> gs.Variable:
        """A new node of ONNX Runtime's own operator set (com.microsoft)."""
        return self.op(op, *inputs, hint=hint, domain=MICROSOFT, **attrs)

    def reduce_max(self, x: gs.Tensor, axis: int, hint: str = "") -> gs.Variable:
        """Largest number along ``axis``, which stays as 1."""
        if self.model.opset >= 18:
            return self.op("ReduceMax", x, self.integers([axis], f"{hint}_axes"), hint=hint, keepdims=1)
        return self.op("ReduceMax", x, hint=hint, axes=[axis], keepdims=1)

    def linear(self, x: gs.Tensor, weight: Array | Values, bias: Array | None, *, axis: int = -1,
               hint: str = "linear") -> gs.Variable:
        """``x W + b`` for ``weight [d_in, d_out]``: a MatMul and an Add, or a 1×1 Conv where the features are channels."""
        if axis != -1:
            return self._convolution(x, weight, bias, axis, hint)
        product = self.op("MatMul", x, self.constant(weight, f"{hint}_weight"), hint=hint)
        if bias is None:
            return product
        return self.op("Add", product, self.constant(bias, f"{hint}_bias"), hint=f"{hint}_add")

    def _convolution(self, x: gs.Tensor, weight: Array | Values, bias: Array | None, axis: int, hint: str) -> gs.Variable:
        matrix = weight.load() if isinstance(weight, Values) else weight
        kernel = np.ascontiguousarray(matrix.T).reshape(*matrix.T.shape, *[1] * (-axis - 1))
        inputs: list[gs.Tensor] = [x, self.constant(kernel, f"{hint}_weight")]
        if bias is not None:
            inputs.append(self.constant(bias, f"{hint}_bias"))
        return self.op("Conv", *inputs, hint=hint, kernel_shape=[1] * (-axis - 1))

    def vector(self, values: Array, axis: int, hint: str) -> gs.Constant:
        """One number a feature, shaped so that it broadcasts against a value with its features on ``axis``."""
        return self.constant(values.reshape(-1, *[1] * (-axis - 1)), hint)

    def zeros(self, x: gs.Tensor, width: int, axis: int, hint: str = "zeros") -> gs.Variable:
        """Zeros shaped like ``x`` but with ``width`` features."""
        shape = self.op("Shape", x, hint=f"{hint}_shape")
        if axis == -1:
            leading = self.op("Slice", shape, self.integers([0], f"{hint}_start"), self.integers([-1], f"{hint}_end"),
                              hint=f"{hint}_leading")
            parts: list[gs.Tensor] = [leading, self.integers([width], f"{hint}_width")]
        else:
            ends = [self.op("Slice", shape, self.integers([a], f"{hint}_start"), self.integers([b], f"{hint}_end"),
                            hint=f"{hint}_part") for a, b in ((0, axis), (axis + 1, 1 << 31))]
            parts = [ends[0], self.integers([width], f"{hint}_width"), ends[1]]
        target = self.op("Concat", *parts, hint=f"{hint}_target", axis=0)
        zero = gs.Constant("", InlineValues(np.zeros(1, numpy_type(self.onnx_type))))
        return self.op("ConstantOfShape", target, hint=hint, value=zero)
