"""The work in a graph: operations of its matrix products, and bytes that have to be moved for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graph.model import Model
from .feeds import Feed
from .placement import kernel_events
from .sessions import Source, open_session

_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "TransposeMatMul", "FusedMatMulActivation"})
_INTEGER = frozenset({"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulNBits"})
_GEMMS = {"Gemm": None, "FusedGemm": None, "QGemm": "int8"}
_CONVOLUTIONS = {"Conv": None, "FusedConv": None, "ConvInteger": "int8", "QLinearConv": "int8"}
_ROWS = frozenset({"Gather", "GatherBlockQuantized", "GatherElements", "GatherND"})  # of a weight, only what they take is read
_TYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "double": "float64"}

Shape = Sequence[int]


@dataclass(frozen=True)
class Work:
    """What one run of a graph does.

    Attributes:
        operations: multiplications and additions of the matrix products, by the type they are done in (``int8`` where the
            weight is integer); everything else is small beside them and not counted.
        weight_bytes: weights as stored, each time a node reads one; of an embedding only the rows.
        edge_bytes: inputs and outputs of the graph.
    """

    operations: Mapping[str, int]
    weight_bytes: int
    edge_bytes: int

    @property
    def bytes(self) -> int:
        """The least that has to be moved: activations are taken to stay in the cache."""
        return self.weight_bytes + self.edge_bytes

    @property
    def total_operations(self) -> int:
        """Of all types."""
        return sum(self.operations.values())


def count_work(source: Source, feed: Feed, *, provider: str = "cpu", threads: int | None = None) -> Work:
    """Run ``source`` on ``feed`` once, as its file has it (no fusions), and count.

    Raises:
        InputError: ONNX Runtime fails.
    """
    model = source if isinstance(source, Model) else Model.load(source)
    session = open_session(model, provider=provider, threads=threads, optimize=False, trace=True,
                           config={"session.disable_prepacking": "1"})
    outputs = session.run(feed)
    trace = Path(session.raw.end_profiling()).read_text(encoding="utf-8", errors="replace")
    equations = _equations(model)
    operations: Counter[str] = Counter()
    weights = 0
    for name, details in kernel_events(trace):
        op, ins, outs = str(details.get("op_name", "")), _shapes(details, "input"), _shapes(details, "output")
        kind, count = _operations(op, ins, outs, equations.get(name, ""))
        operations[kind] += count
        stored, given_out = (int(details.get(key, 0)) for key in ("parameter_size", "output_size"))
        weights += min(stored, given_out) if op in _ROWS else stored
    edges = sum(getattr(value, "nbytes", 0) for value in (*feed.values(), *outputs.values()))
    return Work({kind: count for kind, count in operations.items() if count}, weights, edges)


def _shapes(details: Mapping[str, Any], which: str) -> list[tuple[str, list[int]]]:
    return [(kind, shape) for value in details.get(f"{which}_type_shape", ()) for kind, shape in value.items()]


def _operations(op: str, ins: Sequence[tuple[str, Shape]], outs: Sequence[tuple[str, Shape]], equation: str) -> tuple[str, int]:
    """Type and number of the operations of one node."""
    if not ins or not outs:
        return "float32", 0
    kind, first, result = _TYPES.get(ins[0][0], "int8"), ins[0][1], outs[0][1]
    if op in _PRODUCTS or op in _INTEGER:
        return "int8" if op in _INTEGER else kind, 2 * math.prod(result) * (first[-1] if first else 1)
    if op in _GEMMS:
        return _GEMMS[op] or kind, 2 * math.prod(first) * result[-1]
    if op in _CONVOLUTIONS:
        weight = next((shape for _, shape in ins[1:] if len(shape) == len(first)), ())
        return _CONVOLUTIONS[op] or kind, 2 * math.prod(result) * math.prod(weight[1:])
    if op == "Einsum" and equation:
        return kind, 2 * _einsum(equation, [shape for _, shape in ins])
    if op in ("MultiHeadAttention", "GroupQueryAttention", "Attention"):
        return kind, _attention(op, [shape for _, shape in ins], [shape for _, shape in outs])
    return kind, 0


def _einsum(equation: str, shapes: Sequence[Shape]) -> int:
    """Products of an Einsum of two values: the sizes of all its letters multiplied."""
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(terms) != 2:
        return 0
    for term, shape in zip(terms, shapes, strict=False):
        head, dots, tail = term.partition("...")
        for place, letter in enumerate(head):
            sizes[letter] = shape[place]
        for place, letter in enumerate(reversed(tail), 1):
            sizes[letter] = shape[-place]
        if dots:
            sizes["..."] = max(sizes.get("...", 1), math.prod(shape[len(head):len(shape) - len(tail)]))
    return math.prod(sizes.values())


def _attention(op: str, ins: Sequence[Shape], outs: Sequence[Shape]) -> int:
    """Scores and their product with the values; in the fused ``Attention`` of com.microsoft the projection too."""
    result = outs[0]
    rows = math.prod(result[:-1])
    past = next((shape for shape in outs[1:] if len(shape) >= 4), None)
    keys = past[-2] if past is not None else ins[1][-2] if op != "Attention" and len(ins) > 1 and len(ins[1]) > 2 else ins[0][-2]
    if len(result) == 4:  # [batch, heads, tokens, d]
        keys = ins[1][-2] if len(ins) > 1 else keys
    projected = 2 * rows * math.prod(ins[1]) if op == "Attention" and len(ins) > 1 and len(ins[1]) == 2 else 0
    return projected + 4 * rows * keys * result[-1]


def _equations(model: Model) -> dict[str, str]:
    return {node.name: str(node.attrs.get("equation", "")) for _, graph in model.graphs() for node in graph.nodes
            if node.op == "Einsum"}
