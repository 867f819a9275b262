"""The roofline: what the machine could do at best with the work of a graph, measured with ONNX Runtime itself."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..graph.errors import InputError
from ..graph.types import numpy_type
from .onnx_runtime import onnx_runtime, providers, session_options
from .ort_values import device_value
from .work import Work

_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16,
          "float64": TensorProto.DOUBLE}
_WIDTH = {"cpu": 1024, "cuda": 4096}  # of the square matrices that are multiplied
_READ = {"cpu": 8192, "cuda": 16384}  # of the square matrix that one row is multiplied with
_SECONDS = 1.0


@dataclass(frozen=True)
class Roof:
    """What this machine reaches with these threads.

    Attributes:
        gops: type → 10⁹ operations a second of a large matrix product.
        read_gbs: 10⁹ bytes a second that a product of one row with a matrix larger than the cache reads.
    """

    gops: Mapping[str, float]
    read_gbs: float

    def to_json(self) -> dict[str, Any]:
        """Entries of ``machine``."""
        return {"matmul_gops": dict(self.gops), "read_gbs": self.read_gbs}

    def bound_ms(self, work: Work) -> tuple[float, str]:
        """The least time that ``work`` can take, ``max(Σ operations / rate, bytes / bandwidth)``, and which of the two it is."""
        compute = sum(count / self.gops[kind] for kind, count in work.operations.items()) / 1e6
        memory = work.bytes / self.read_gbs / 1e6
        return max(compute, memory), "compute" if compute >= memory else "memory"

    def entry(self, work: Work, p50_ms: float) -> dict[str, Any]:
        """A model's entry ``roofline``; ``reached`` is the bound's share of the time measured."""
        bound, limit = self.bound_ms(work)
        return {"operations": work.total_operations, "operations_by_type": dict(work.operations),
                "weight_bytes": work.weight_bytes, "edge_bytes": work.edge_bytes,
                "operations_per_byte": work.total_operations / max(1, work.bytes), "bound_ms": bound, "limit": limit,
                "reached": bound / p50_ms}


def measure_roof(kinds: Iterable[str], *, provider: str = "cpu", threads: int | None = None, use_tf32: bool = False,
                 seconds: float = _SECONDS) -> Roof:
    """Measure products of the types ``kinds`` and reading; the best of many runs, so that other work on the machine hides
    little.

    Raises:
        InputError: ONNX Runtime has no such product here.
    """
    width = _WIDTH[provider]
    options = (provider, threads, use_tf32, seconds)
    gops = {}
    for kind in sorted(set(kinds)):
        best = _best(_integer_product(width) if kind == "int8" and provider == "cpu" else
                     _product(kind if kind in _TYPES else "float16", width, width), width, *options)
        gops[kind] = 2 * width ** 3 / best / 1e9
    deep = _READ[provider]
    return Roof(gops, deep * deep * 4 / _best(_product("float32", 1, deep), deep, *options, packed=False) / 1e9)


def _product(kind: str, rows: int, width: int) -> onnx.ModelProto:
    """y = x W, ``[rows, width]`` by ``[width, width]``; W is made when it is loaded."""
    onnx_type = _TYPES[kind]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [width, width])
    fill = helper.make_tensor("fill", onnx_type, [1], [0.5])
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["w"], value=fill), helper.make_node("MatMul", ["x", "w"], ["y"])]
    return _model(nodes, rows, width, onnx_type, [shape])


def _integer_product(width: int) -> onnx.ModelProto:
    weight = onnx.numpy_helper.from_array(np.full((width, width), 3, np.int8), "w")
    scale = onnx.numpy_helper.from_array(np.full(1, 0.01, np.float32), "scale")
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft")
    return _model([node], width, width, TensorProto.FLOAT, [weight, scale])


def _model(nodes: list[onnx.NodeProto], rows: int, width: int, onnx_type: int,
           weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, onnx_type, [rows, width]) for name in "xy"]
    graph = helper.make_graph(nodes, "roof", values[:1], values[1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _best(model: onnx.ModelProto, width: int, provider: str, threads: int | None, use_tf32: bool, seconds: float, *,
          packed: bool = True) -> float:
    """The shortest run in seconds."""
    options = session_options({} if packed else {"session.disable_prepacking": "1"}, threads, True)
    value = model.graph.input[0].type.tensor_type
    rows, onnx_type = value.shape.dim[0].dim_value, value.elem_type
    try:
        session = onnx_runtime().InferenceSession(model.SerializeToString(), options,
                                                  providers=providers(provider, {}, use_tf32), enable_fallback=False)
        binding = session.io_binding()
        given = device_value(np.ones((rows, width), numpy_type(onnx_type)), onnx_type, provider)
        binding.bind_ortvalue_input("x", given)
        binding.bind_output("y", provider)
        best, end, runs = float("inf"), time.perf_counter() + seconds, 0
        while runs < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            best = min(best, time.perf_counter() - start) if runs else best
            runs += 1
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--roofline: ONNX Runtime cannot multiply matrices here ({str(error).splitlines()[0][:150]}): "
                         "leave it out") from None
    return best
