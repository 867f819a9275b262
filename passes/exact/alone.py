"""How many nodes ONNX Runtime executes for a few nodes of a graph: asked, with those nodes alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from ...graph.constant import Folded, fold
from ...graph.errors import InputError
from ...graph.model import Model
from ...graph.sort import topological
from ...graph.weights import nbytes_of
from ...runtime.executed import executed_ops
from ..base import Context

_INT64 = onnx.TensorProto.INT64
_SMALL = 1024  # bytes; larger constants are weights, of which only the shape counts
_INTEGER_INPUTS = {"Reshape": (1,), "Expand": (1,), "Tile": (1,), "Slice": (1, 2, 3, 4), "Gather": (1,), "GatherND": (1,),
                   "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "SplitToSequence": (1,), "SequenceAt": (1,)}


def executed_alone(model: Model, nodes: Sequence[gs.Node], result: gs.Tensor, onnx_type: int, rank: int,
                   context: Context) -> int | None:
    """Nodes left of ``nodes``, which compute ``result``, after ONNX Runtime's optimizations; None where it does not say.

    Weights count by their shape: they are zeros in a file with a hole, so that nothing of their size is in memory.
    Parts of one form are asked about once in a plan.

    Args:
        onnx_type, rank: of the values that go in, where they do not say themselves.
    """
    part = _Part(model, onnx_type, rank)
    try:
        proto = part.build(topological(list(nodes)), result)
    except _NotPlainError:
        return None
    data = proto.SerializeToString(deterministic=True)
    key = ("executed alone", context.provider, data)
    if key not in context.memo:
        context.memo[key] = _ask(data, part.largest, context)
    found: int | None = context.memo[key]
    return found


class _NotPlainError(Exception):
    """Something in the part cannot be written down on its own."""


def _ask(data: bytes, largest: int, context: Context) -> int | None:
    try:
        if not largest:
            return sum(executed_ops(data, provider=context.provider, threads=1).values())
        with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
            with (Path(folder) / "zeros").open("wb") as zeros:
                zeros.truncate(largest)
            path = Path(folder) / "part.onnx"
            path.write_bytes(data)
            counts = executed_ops(path, provider=context.provider, threads=1, config={"session.disable_prepacking": "1"})
            return sum(counts.values())
    except InputError:
        return None


class _Part:
    """Writes nodes as a model of their own, under names that do not depend on where they were."""

    def __init__(self, model: Model, onnx_type: int, rank: int) -> None:
        self._model, self._type, self._rank = model, onnx_type, rank
        self._names: dict[int, str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self.largest = 0

    def build(self, nodes: Sequence[gs.Node], result: gs.Tensor) -> onnx.ModelProto:
        """The model."""
        made = {id(tensor) for node in nodes for tensor in node.outputs}
        protos = []
        for number, node in enumerate(nodes):
            inputs = [self._read(node, index, tensor, made) for index, tensor in enumerate(node.inputs)]
            outputs = [self._name(tensor) if tensor.name else "" for tensor in node.outputs]
            protos.append(onnx.helper.make_node(node.op, inputs, outputs, name=f"n{number}", domain=node.domain or "",
                                                **_plain(node.attrs)))
        output = onnx.helper.make_tensor_value_info(self._name(result), self._type, None)
        graph = onnx.helper.make_graph(protos, "part", self._inputs, [output], self._initializers)
        opsets = {**self._model.opsets, **{node.domain: self._model.opsets.get(node.domain, 1) for node in nodes if node.domain}}
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(*entry) for entry in sorted(opsets.items())],
                                      ir_version=min(self._model.proto.ir_version, onnx.IR_VERSION))

    def _name(self, tensor: gs.Tensor) -> str:
        return self._names.setdefault(id(tensor), f"v{len(self._names)}")

    def _read(self, node: gs.Node, index: int, tensor: gs.Tensor, made: set[int]) -> str:
        if not tensor.name:
            return ""
        known = id(tensor) in self._names or id(tensor) in made
        name = self._name(tensor)
        if known:
            return name
        folded = fold(tensor)
        if folded is not None and not folded.overridable:
            self._initializers.append(self._constant(name, folded))
            return name
        kind, shape = (folded.onnx_type, list(folded.shape)) if folded is not None else (tensor.dtype, tensor.shape)
        if index in _INTEGER_INPUTS.get(node.op, ()) and not isinstance(kind, int):
            kind, shape = _INT64, shape or [None]
        self._inputs.append(onnx.helper.make_tensor_value_info(
            name, kind if isinstance(kind, int) else self._type, shape if shape is not None else [None] * self._rank))
        return name

    def _constant(self, name: str, folded: Folded) -> onnx.TensorProto:
        size = nbytes_of(folded.shape, folded.onnx_type)
        if size <= _SMALL:
            return onnx.numpy_helper.from_array(folded.load(), name)
        tensor = onnx.TensorProto(name=name, dims=folded.shape, data_type=folded.onnx_type,
                                  data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", "zeros"), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        self.largest = max(self.largest, size)
        return tensor


def _plain(attrs: dict[str, Any]) -> dict[str, Any]:
    if any(not isinstance(value, (int, float, str, list)) for value in attrs.values()):
        raise _NotPlainError
    return {key: value for key, value in attrs.items() if value != []}
