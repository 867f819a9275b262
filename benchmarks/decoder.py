"""A decoder of a real shape with random weights, written as a file: embedding, layers, norm, head, key and value states.

Each layer, x [batch, tokens, d_model]:

    x = x + attention(norm(x)) Wₒ
    x = x + ffn(norm(x))            ffn: (silu(n W_gate) · n W_up) W_down, or gelu(n W_up) W_down where it is not gated

Attention is what the decoders have that run in ONNX Runtime: one product for query, key and value, then
GroupQueryAttention with rotary positions (``attention="fused"``), its lengths computed from the attention mask; or the same
in single operators as exporters write it (``attention="plain"``). The head sees the last token only.

Inputs: ``input_ids [batch, tokens]``, ``attention_mask [batch, past + tokens]``, ``past_key_values.N.key`` and ``.value``
``[batch, heads, past, d_head]``. Outputs: ``logits [batch, 1, vocabulary]``, ``present.N.key`` and ``.value``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = 21
_CHUNK = 1 << 22  # numbers made at once
_SMALL = 1024  # bytes; constants below stay in the .onnx file


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the defaults are those of a Llama with 7 billion parameters, but for ``layers``.

    Attributes:
        d_ff: intermediate width.
        kv_heads: heads of key and value, each for several of the query (arXiv 2305.13245); 0: as many as those.
        context: longest sequence.
        dtype: ``float16`` or ``float32``.
    """

    layers: int = 8
    d_model: int = 4096
    d_ff: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    context: int = 2048
    gated: bool = True
    attention: Literal["fused", "plain"] = "fused"
    dtype: str = "float16"
    kv_heads: int = 0

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.d_model // self.heads

    @property
    def states(self) -> int:
        """Heads of key and value."""
        return self.kv_heads or self.heads

    @property
    def ffn_parameters(self) -> int:
        """Parameters of the FFN of one layer."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff


def write_decoder(path: Path, shape: Shape, seed: int = 0) -> None:
    """Write the decoder of ``shape`` to ``path``, its weights to ``path`` + ``.data``. The same arguments, the same bytes."""
    sketch = _Sketch(shape)
    sketch.decoder()
    data = path.with_name(path.name + ".data")
    proto = sketch.model(data.name)
    with open(data, "wb") as stream, ThreadPoolExecutor(os.cpu_count()) as pool:
        stream.truncate(sketch.size)
        for done in [pool.submit(job, stream.fileno(), seed) for job in sketch.jobs]:
            done.result()
    path.write_bytes(proto.SerializeToString())


def feed(shape: Shape, batch: int, tokens: int, past: int = 0, seed: int = 0) -> dict[str, Any]:
    """Random tokens, after ``past`` others whose states are random too."""
    random = np.random.default_rng([seed, batch, tokens, past])
    states = (batch, shape.states, past, shape.d_head)
    return {"input_ids": random.integers(0, shape.vocabulary, (batch, tokens)),
            "attention_mask": np.ones((batch, past + tokens), np.int64),
            **{f"past_key_values.{layer}.{kind}": (random.standard_normal(states) * 0.5).astype(shape.dtype)
               for layer in range(shape.layers) for kind in ("key", "value")}}


class _Sketch:
    """The graph in the making; what adds something returns the name of the value it makes."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.onnx_type = helper.np_dtype_to_tensor_dtype(np.dtype(shape.dtype))
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.jobs: list[Callable[[int, int], None]] = []
        self.size = 0

    def model(self, data: str) -> onnx.ModelProto:
        """The whole, with its large weights in the file called ``data``."""
        for tensor in self.tensors:
            if tensor.data_location == TensorProto.EXTERNAL:
                tensor.external_data.add(key="location", value=data)
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self.tensors)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="ffnfold-benchmark")

    def decoder(self) -> None:
        """All of it."""
        shape = self.shape
        self.input("input_ids", TensorProto.INT64, ["batch", "tokens"])
        self.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        x = self.op("Gather", self.random("embedding", shape.vocabulary, shape.d_model, scale=1.0), "input_ids")
        attend = self.fused() if shape.attention == "fused" else self.plain()
        for layer in range(shape.layers):
            name = f"/layers.{layer}"
            states = [self.input(f"past_key_values.{layer}.{kind}", self.onnx_type, ["batch", shape.states, "past", shape.d_head])
                      for kind in ("key", "value")]
            mixed = attend(self.norm(x, f"{name}/attention_norm"), states, layer)
            x = self.op("Add", x, self.linear(mixed, shape.d_model, shape.d_model, f"{name}/attention/o", residual=True))
            x = self.op("Add", x, self.ffn(self.norm(x, f"{name}/ffn_norm"), f"{name}/ffn"))
        last = self.op("Gather", self.norm(x, "/norm"), self.constant("last", np.asarray([-1])), axis=1)
        logits = self.linear(last, shape.d_model, shape.vocabulary, "/head")
        self.output(self.op("Identity", logits, out="logits"), ["batch", 1, shape.vocabulary])

    def ffn(self, x: str, name: str) -> str:
        """down(silu(gate x) · up x), or down(gelu(up x))."""
        shape = self.shape
        if shape.gated:
            gate = self.linear(x, shape.d_model, shape.d_ff, f"{name}/gate")
            up = self.linear(x, shape.d_model, shape.d_ff, f"{name}/up")
            hidden = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        else:
            hidden = self.op("Gelu", self.linear(x, shape.d_model, shape.d_ff, f"{name}/up"), approximate="tanh")
        return self.linear(hidden, shape.d_ff, shape.d_model, f"{name}/down", residual=True)

    def fused(self) -> Callable[[str, list[str], int], str]:
        """Attention in one node. The lengths it wants come from the mask: the last index of each row, and the whole length."""
        shape = self.shape
        one = self.constant("one", np.asarray([1]))
        counted = self.op("ReduceSum", "attention_mask", one, keepdims=0)
        ends = self.op("Cast", self.op("Sub", counted, one), to=TensorProto.INT32)
        width = self.op("Gather", self.op("Shape", "attention_mask"), self.constant("second", np.asarray(1)), axis=0)
        total = self.op("Cast", width, to=TensorProto.INT32)
        angles = self.angles()
        caches = [self.constant(name, table(angles).astype(shape.dtype)) for name, table in (("cos", np.cos), ("sin", np.sin))]

        def attend(x: str, states: list[str], layer: int) -> str:
            name = f"/layers.{layer}/attention"
            packed = self.linear(x, shape.d_model, shape.d_model + 2 * shape.states * shape.d_head, f"{name}/qkv")
            present = [self.state(layer, kind) for kind in ("key", "value")]
            return self.op("GroupQueryAttention", packed, "", "", *states, ends, total, *caches, name=name,
                           domain="com.microsoft", more=present, num_heads=shape.heads, kv_num_heads=shape.states, do_rotary=1)

        return attend

    def plain(self) -> Callable[[str, list[str], int], str]:
        """Attention in single operators."""
        shape = self.shape
        if shape.states != shape.heads:
            raise ValueError("attention in single operators has as many heads of key and value as of the query")
        zero, first, last = (self.constant(f"index_{index}", np.asarray([index])) for index in (0, 1, -1))
        tokens = self.op("Shape", "input_ids", start=1, end=2)
        total = self.op("Shape", "attention_mask", start=1, end=2)
        past = self.op("Sub", total, tokens)
        angles = np.concatenate([self.angles()] * 2, axis=-1)
        rotations = [self.op("Slice", self.constant(name, table(angles).astype(shape.dtype)), past, total, zero)
                     for name, table in (("cos", np.cos), ("sin", np.sin))]
        hidden = np.triu(np.full((shape.context, shape.context), -60000.0), 1).astype(shape.dtype)
        mask = self.op("Slice", self.op("Slice", self.constant("causal", hidden), past, total, zero), zero, total, first)
        heads = self.constant("heads", np.asarray([0, 0, shape.heads, shape.d_head]))
        flat = self.constant("flat", np.asarray([0, 0, shape.d_model]))
        half, whole = (self.constant(f"width_{width}", np.asarray([width])) for width in (shape.d_head // 2, shape.d_head))
        scale = self.constant("scale", np.asarray(shape.d_head ** -0.5, shape.dtype))

        def split(x: str) -> str:
            return self.op("Transpose", self.op("Reshape", x, heads), perm=[0, 2, 1, 3])

        def rotate(x: str) -> str:
            turned = self.op("Concat", self.op("Neg", self.op("Slice", x, half, whole, last)),
                             self.op("Slice", x, zero, half, last), axis=-1)
            return self.op("Add", self.op("Mul", x, rotations[0]), self.op("Mul", turned, rotations[1]))

        def attend(x: str, states: list[str], layer: int) -> str:
            q, k, v = (split(self.linear(x, shape.d_model, shape.d_model, f"/layers.{layer}/attention/{kind}")) for kind in "qkv")
            k = self.op("Concat", states[0], rotate(k), axis=2, out=self.state(layer, "key"))
            v = self.op("Concat", states[1], v, axis=2, out=self.state(layer, "value"))
            scores = self.op("MatMul", self.op("Mul", rotate(q), scale), self.op("Transpose", k, perm=[0, 1, 3, 2]))
            weights = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
            return self.op("Reshape", self.op("Transpose", self.op("MatMul", weights, v), perm=[0, 2, 1, 3]), flat)

        return attend

    def angles(self) -> Any:
        """Rotary positions (arXiv 2104.09864): ``[context, d_head / 2]``."""
        half = self.shape.d_head // 2
        return np.outer(np.arange(self.shape.context), 10000.0 ** (-np.arange(half) / half))

    def state(self, layer: int, kind: str) -> str:
        """An output for the key or value states of ``layer``."""
        return self.output(f"present.{layer}.{kind}", ["batch", self.shape.states, "total", self.shape.d_head])

    def norm(self, x: str, name: str) -> str:
        """RMS norm (arXiv 1910.07467)."""
        scale = 1 + 0.1 * np.random.default_rng(len(self.tensors)).standard_normal(self.shape.d_model)
        return self.op("SimplifiedLayerNormalization", x, self.constant(f"{name}.weight", scale.astype(self.shape.dtype)),
                       name=name, axis=-1, epsilon=1e-5)

    def linear(self, x: str, d_in: int, d_out: int, name: str, residual: bool = False) -> str:
        """x W; smaller where it is added to the residual, so that the sum keeps its size through the layers."""
        scale = d_in ** -0.5 / ((2 * self.shape.layers) ** 0.5 if residual else 1)
        return self.op("MatMul", x, self.random(f"{name}.weight", d_in, d_out, scale=scale), name=f"{name}/MatMul")

    def random(self, name: str, *dims: int, scale: float) -> str:
        """A weight of normal numbers, in external data, written by ``jobs``."""
        dtype, number, start, count = np.dtype(self.shape.dtype), len(self.tensors), self.size, int(np.prod(dims))

        def write(begin: int, descriptor: int, seed: int) -> None:
            random = np.random.default_rng([seed, number, begin])
            values = random.standard_normal(min(_CHUNK, count - begin), np.float32) * np.float32(scale)
            data = values.astype(dtype).tobytes()
            assert os.pwrite(descriptor, data, start + begin * dtype.itemsize) == len(data)

        for begin in range(0, count, _CHUNK):
            self.jobs.append(lambda descriptor, seed, begin=begin: write(begin, descriptor, seed))
        tensor = TensorProto(name=name, dims=dims, data_type=self.onnx_type, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="offset", value=str(start))
        tensor.external_data.add(key="length", value=str(count * dtype.itemsize))
        self.size = (start + count * dtype.itemsize + 4095) // 4096 * 4096
        self.tensors.append(tensor)
        return name

    def constant(self, name: str, values: Any) -> str:
        """A weight that is given; large ones go to the external data too."""
        if values.nbytes < _SMALL:
            self.tensors.append(numpy_helper.from_array(values, name))
            return name
        start, data = self.size, np.ascontiguousarray(values).tobytes()
        tensor = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
                             data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="offset", value=str(start))
        tensor.external_data.add(key="length", value=str(len(data)))
        self.jobs.append(lambda descriptor, seed: _write_all(descriptor, data, start))
        self.size = (start + len(data) + 4095) // 4096 * 4096
        self.tensors.append(tensor)
        return name

    def input(self, name: str, onnx_type: int, dims: list[Any]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, onnx_type, dims))
        return name

    def output(self, name: str, dims: list[Any]) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, self.onnx_type, dims))
        return name

    def op(self, op: str, *inputs: str, out: str = "", more: list[str] | None = None, name: str = "", domain: str = "",
           **attributes: Any) -> str:
        """A node; returns its first output."""
        number = len(self.nodes)
        self.nodes.append(helper.make_node(op, list(inputs), [out or f"{op}_{number}", *(more or [])],
                                           name=name or f"/{op}_{number}", domain=domain, **attributes))
        return self.nodes[-1].output[0]


def _write_all(descriptor: int, data: bytes, start: int) -> None:
    assert os.pwrite(descriptor, data, start) == len(data)
