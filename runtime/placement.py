"""Where each node of a model ran: on which provider, with values of which types."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

CPU = "CPUExecutionProvider"
_COPIES = {"MemcpyFromHost", "MemcpyToHost"}
_READ_SHAPES = {"Shape", "Size"}  # of what goes in, only the dimensions
_SHAPE_TYPES = {"int64", "int32", "bool", "string"}  # what arithmetic on shapes is done in
_CPU_INT8 = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "ConvInteger",
             "DynamicQuantizeLSTM", "QAttention", "QGemm", "QLinearMatMul", "QLinearConv", "QuantizeLinear"}
_LISTED = 3  # names given for each operator


@dataclass(frozen=True)
class PlacedNode:
    """A node as ONNX Runtime ran it, after its own fusions.

    Attributes:
        name, op: of the node; fusions have names and operators that the file does not have.
        provider: ONNX Runtime's name of it.
        values: type and number of elements of each value that went in or came out; weights packed ahead are left out.
    """

    name: str
    op: str
    provider: str
    values: tuple[tuple[str, int], ...]

    @property
    def computes(self) -> bool:
        """Whether it is more than arithmetic on shapes: it has values of another type than int64, int32 and bool, and
        these are not all single numbers (such as the square root of a dimension)."""
        return any(kind not in _SHAPE_TYPES and count > 1 for kind, count in self.values)


@dataclass(frozen=True)
class Placement:
    """Every node that ran, once each, in the order of their first run."""

    nodes: tuple[PlacedNode, ...]

    @cached_property
    def by_provider(self) -> Mapping[str, int]:
        """Provider → nodes on it."""
        return dict(sorted(Counter(node.provider for node in self.nodes).items()))

    @cached_property
    def copies(self) -> int:
        """Copies between the CPU and the device that ONNX Runtime put in."""
        return sum(node.op in _COPIES for node in self.nodes)

    @cached_property
    def stranded(self) -> tuple[PlacedNode, ...]:
        """Nodes on the CPU that do more than arithmetic on shapes, where another provider was asked for."""
        return tuple(node for node in self.nodes if node.provider == CPU and node.computes)

    def to_json(self) -> dict[str, Any]:
        """``nodes_by_provider``, ``memcpy_nodes``, and ``fallback_nodes``: those that compute on the CPU."""
        return {"nodes_by_provider": dict(self.by_provider), "memcpy_nodes": self.copies,
                "fallback_nodes": [{"name": node.name, "op": node.op} for node in self.stranded]}

    def complaint(self) -> str | None:
        """Which nodes fell back to the CPU and how to mend it, as the rest of a sentence; None where none did."""
        if not self.stranded:
            return None
        names: dict[str, list[str]] = {}
        for node in self.stranded:
            names.setdefault(node.op, []).append(f"'{node.name}'")
        listed = "; ".join(f"{len(each)} {op} ({', '.join(each[:_LISTED])}{', …' if len(each) > _LISTED else ''})"
                           for op, each in names.items())
        hint = ("it was quantized for a CPU: for CUDA quantize the weights only (quantize-ffn:form=weight-only)"
                if names.keys() & _CPU_INT8 else
                "CUDA has no kernel for these operators in these types: use others")
        several = "s that compute" if len(self.stranded) > 1 else " that computes"
        return (f"{len(self.stranded)} node{several} fell back to the CPU, with {self.copies} copies between it and CUDA: "
                f"{listed}: {hint}, or allow it (--allow-cpu-nodes)")


def read_trace(path: Path) -> Placement:
    """The placement in a profile that ONNX Runtime wrote. Events that cannot be read are left out: it does not escape names."""
    found: dict[tuple[str, str, str], PlacedNode] = {}
    for name, details in kernel_events(path.read_text(encoding="utf-8", errors="replace")):
        op = str(details.get("op_name", ""))
        values = [*(() if op in _READ_SHAPES else details.get("input_type_shape", ())), *details.get("output_type_shape", ())]
        node = PlacedNode(name, op, details["provider"], tuple(_sizes(values)))
        found.setdefault((node.name, str(details.get("node_index", "")), node.provider), node)
    return Placement(tuple(found.values()))


def kernel_events(trace: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Name of a node and what a profile says of its run, for each run of each node."""
    for event in _events(trace):
        details, name = event.get("args", {}), str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and "provider" in details:
            yield name.removesuffix("_kernel_time"), details


def _events(text: str) -> Iterable[dict[str, Any]]:
    try:
        return [event for event in json.loads(text) if isinstance(event, dict)]
    except ValueError:
        return [event for line in text.splitlines() if (event := _event(line)) is not None]


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line.strip().rstrip(","))
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _sizes(values: Sequence[Mapping[str, Sequence[int]]]) -> Iterable[tuple[str, int]]:
    for value in values:
        for kind, shape in value.items():
            yield kind, math.prod(shape)
