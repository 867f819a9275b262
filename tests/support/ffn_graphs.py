"""Small graphs, drawn in a few lines, and ONNX Runtime to run them before and after a rewrite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from ffnfold.graph.model import Model
from ffnfold.runtime import open_session
from onnx import TensorProto, helper, numpy_helper

Feed = Mapping[str, Any]
Shape = Sequence[int | str | None] | None

onnxruntime.set_default_logger_severity(3)


class Sketch:
    """A graph in the making. Every method that adds something returns the name of the value it makes.

    Weights are drawn from one generator, so that the same sketch has the same numbers each time.
    """

    def __init__(self, opset: int = 17, seed: int = 0, dtype: Any = np.float32) -> None:
        self.opset = opset
        self.dtype = np.dtype(dtype)
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.value_info: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: set[str] = set()

    @property
    def onnx_type(self) -> int:
        return helper.np_dtype_to_tensor_dtype(self.dtype)

    def numbers(self, *shape: int, scale: float | None = None) -> np.ndarray:
        """Normal numbers; by default so small that a product over the first axis keeps its size."""
        scale = 1 / np.sqrt(shape[0] if shape else 1) if scale is None else scale
        return (self.random.standard_normal(shape) * scale).astype(self.dtype)

    def input(self, name: str, shape: Shape, onnx_type: int | None = None) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, onnx_type or self.onnx_type, shape))
        return name

    def output(self, name: str, shape: Shape = None, onnx_type: int | None = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, onnx_type or self.onnx_type, shape))
        return name

    def info(self, name: str, shape: Shape, onnx_type: int | None = None) -> str:
        """Say what shape a value in between has."""
        self.value_info.append(helper.make_tensor_value_info(name, onnx_type or self.onnx_type, shape))
        return name

    def weight(self, array: Any, name: str | None = None) -> str:
        name = name or f"weight_{len(self.initializers)}"
        self.initializers[name] = (array if isinstance(array, TensorProto) else numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op: str, *inputs: str, out: str | Sequence[str] | None = None, name: str | None = None, domain: str = "",
           **attrs: Any) -> str:
        """A node; returns its first output."""
        outputs = [out] if isinstance(out, str) else list(out or [f"{op}_{len(self.nodes)}"])
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=f"/{op}_{len(self.nodes)}" if name is None else name,
                                           domain=domain, **attrs))
        self.domains |= {domain} - {""}
        return outputs[0]

    def graph(self, name: str = "sketch") -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, list(self.initializers.values()),
                                 value_info=self.value_info)

    def model(self) -> onnx.ModelProto:
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in sorted(self.domains))]
        return helper.make_model(self.graph(), opset_imports=opsets, ir_version=10, functions=self.functions)

    def save(self, path: Path, **settings: Any) -> Path:
        onnx.save_model(self.model(), path, **settings)
        return path

    # what transformers are made of

    def linear(self, x: str, d_in: int, d_out: int, *, bias: bool = True, name: str = "") -> str:
        """MatMul, and Add where there is a bias."""
        y = self.op("MatMul", x, self.weight(self.numbers(d_in, d_out)), name=name and f"{name}/MatMul")
        return self.op("Add", y, self.weight(self.numbers(d_out, scale=0.3)), name=name and f"{name}/Add") if bias else y

    def norm(self, x: str, width: int) -> str:
        """LayerNormalization with a scale and a shift that are not trivial."""
        scale, shift = 1 + self.numbers(width, scale=0.1), self.numbers(width, scale=0.1)
        return self.op("LayerNormalization", x, self.weight(scale.astype(self.dtype)), self.weight(shift), axis=-1, epsilon=1e-5)

    def activation(self, name: str, x: str) -> str:
        """An activation by its name in reports, in single operators as exporters write it."""
        return ACTIVATIONS[name](self, x)

    def ffn(self, x: str, d_model: int = 8, d_ff: int = 32, *, activation: str = "relu", gated: bool = False, bias: bool = True,
            d_out: int | None = None, name: str = "") -> str:
        """down(act(up x)) or down(act(gate x) · up x)."""
        up = self.linear(x, d_model, d_ff, bias=bias, name=name and f"{name}/up")
        if gated:
            gate = self.linear(x, d_model, d_ff, bias=bias, name=name and f"{name}/gate")
            hidden = self.op("Mul", self.activation(activation, gate), up)
        else:
            hidden = self.activation(activation, up)
        return self.linear(hidden, d_ff, d_out or d_model, bias=bias, name=name and f"{name}/down")

    def number(self, value: float) -> str:
        return self.weight(np.asarray(value, self.dtype))


def _erf_gelu(s: Sketch, x: str) -> str:
    inner = s.op("Add", s.op("Erf", s.op("Div", x, s.number(np.sqrt(2)))), s.number(1))
    return s.op("Mul", s.op("Mul", x, inner), s.number(0.5))


def _tanh_gelu(s: Sketch, x: str) -> str:
    cube = s.op("Mul", s.op("Pow", x, s.number(3)), s.number(0.044715))
    inner = s.op("Tanh", s.op("Mul", s.op("Add", x, cube), s.number(np.sqrt(2 / np.pi))))
    return s.op("Mul", s.op("Mul", x, s.number(0.5)), s.op("Add", inner, s.number(1)))


ACTIVATIONS: dict[str, Callable[[Sketch, str], str]] = {
    "relu": lambda s, x: s.op("Relu", x),
    "relu2": lambda s, x: s.op("Pow", s.op("Relu", x), s.number(2)),
    "gelu": _erf_gelu,
    "gelu_tanh": _tanh_gelu,
    "quick_gelu": lambda s, x: s.op("Mul", x, s.op("Sigmoid", s.op("Mul", x, s.number(1.702)))),
    "silu": lambda s, x: s.op("Mul", x, s.op("Sigmoid", x)),
    "sigmoid": lambda s, x: s.op("Sigmoid", x),
    "tanh": lambda s, x: s.op("Tanh", x),
    "mish": lambda s, x: s.op("Mul", x, s.op("Tanh", s.op("Softplus", x))),
    "elu": lambda s, x: s.op("Elu", x, alpha=1.0),
    "leaky_relu": lambda s, x: s.op("LeakyRelu", x, alpha=0.1),
    "softplus": lambda s, x: s.op("Softplus", x),
    "identity": lambda s, x: x,
}


def transformer(blocks: int = 2, d_model: int = 8, d_ff: int = 32, *, opset: int = 17, seed: int = 0, pre_norm: bool = True,
                **kind: Any) -> Sketch:
    """``blocks`` FFN blocks one after the other on a residual stream: x [batch, tokens, d_model] → y."""
    s = Sketch(opset, seed)
    x = s.input("x", ["batch", "tokens", d_model])
    for number in range(blocks):
        name = f"/layer.{number}/ffn"
        branch = s.ffn(s.norm(x, d_model) if pre_norm else x, d_model, d_ff, name=name, **kind)
        x = s.op("Add", x, branch, out=f"stream_{number}")
    s.op("Identity", x, out=s.output("y", ["batch", "tokens", d_model]))
    return s


def run(source: onnx.ModelProto | Path | Model, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Any]:
    """What ONNX Runtime gives, without its optimizations where ``source`` is no model in the course of being rewritten."""
    if isinstance(source, Model):
        return open_session(source, threads=1).run(feed, outputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = source.SerializeToString() if isinstance(source, onnx.ModelProto) else str(source)
    session = onnxruntime.InferenceSession(opened, options, providers=["CPUExecutionProvider"])
    names = list(outputs) if outputs is not None else [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def optimized_ops(source: Path, folder: Path) -> list[str]:
    """Operators of the graph that ONNX Runtime really runs, after all its fusions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(folder / "optimized_by_onnx_runtime.onnx")
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def drift(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """The largest ‖after − before‖/‖before‖ over the outputs, which must be the same ones."""
    assert list(before) == list(after)
    worst = 0.0
    for name, reference in before.items():
        a, b = np.asarray(reference, np.float64), np.asarray(after[name], np.float64)
        assert a.shape == b.shape, name
        worst = max(worst, float(np.linalg.norm(b - a) / max(np.linalg.norm(a), 1e-30)))
    return worst


def ops(model: Model | onnx.ModelProto) -> list[str]:
    """Operators of the main graph, in order."""
    proto = model.to_proto()[0] if isinstance(model, Model) else model
    return [node.op_type for node in proto.graph.node]
