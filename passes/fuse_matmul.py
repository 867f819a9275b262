"""fuse-matmul: two constant matrices in a row become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ..graph.broadcast import keeps_rank
from ..graph.builder import Builder
from ..graph.constant import fold
from ..graph.edit import is_output, producer, remove_dead, take_over
from ..graph.linear import Linear, read_linear
from ..graph.model import Model
from ..graph.sort import topological
from ..graph.types import FLOATS, numpy_type
from ..graph.weights import ComputedValues
from .base import Context, Pass, PassResult, Refused
from .exact.cost import released_bytes
from .exact.products import Weight
from .exact.sharing import shows_inside

Array = npt.NDArray[Any]
_TILE = 1 << 20  # elements of W₁ taken at a time


@dataclass(frozen=True)
class FuseMatMul(Pass):
    """Multiply two constant matrices that follow each other, with nothing between them but constants.

        ((x W₁ + b₁) ∘ s + t) W₂ + b₂   =   x (W₁ diag(s) W₂) + ((b₁ ∘ s + t) W₂ + b₂)

    This is what turns an FFN whose activation ``linearize-ffn`` made a line into one matrix. The product is taken in
    float64.

    Does not fire where one matrix would cost more operations than two (d₁·d₃ ≥ d₂·(d₁ + d₃), as in LoRA and other
    bottlenecks), where the value between has another reader or is an output, or gets another axis from a constant, where a
    matrix is quantized, shared with something that stays (the file would grow), or an input that the caller may override;
    where the product may leave the range of its type, by ``|(W₁ diag(s) W₂)ᵢⱼ| ≤ ‖W₁ᵢ ∘ s‖ ‖W₂ⱼ‖``.
    """

    name: ClassVar[str] = "fuse-matmul"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Fuse every pair, first come first, until there is none."""
        fired = 0
        refused: list[Refused] = []
        for path, graph in model.graphs():
            count, refusals = _fuse_graph(model, path, graph)
            fired += count
            refused += refusals
        return self.result(fired, refused)


@dataclass
class _Pair:
    """Two linears and the affine map of each feature between them: ``z ↦ z ∘ scale + shift``."""

    first: Linear
    second: Linear
    scale: Array | None
    shift: Array | None


def _fuse_graph(model: Model, path: str, graph: gs.Graph) -> tuple[int, list[Refused]]:
    linears = {id(linear.output): linear for linear in map(read_linear, topological(graph.nodes)) if linear is not None}
    fired = 0
    refused = []
    for linear in list(linears.values()):
        pair = _pair(graph, linear, linears)
        if pair is None:
            continue
        reason = _reason_against(pair)
        if reason is not None:
            if reason:
                refused.append(Refused(reason, linear.output.name))
            continue
        fused = _fuse(model, path, graph, pair)
        if fused is not None:
            linears.pop(id(pair.first.output), None)
            linears[id(linear.output)] = fused
            fired += 1
    return fired, refused


def _pair(graph: gs.Graph, second: Linear, linears: dict[int, Linear]) -> _Pair | None:
    """The linear that feeds ``second`` through nothing but constants, if the values between are read by nobody else."""
    if second.axis != -1 or shows_inside(graph, second):
        return None
    scale: Array | None = None
    shift: Array | None = None
    tensor = second.input
    for _ in range(8):
        if len(tensor.outputs) != 1 or is_output(graph, tensor):
            return None
        first = linears.get(id(tensor))
        if first is not None:
            if first.axis != -1 or first.d_out != second.d_in or shows_inside(graph, first):
                return None
            return _Pair(first, second, scale, shift)
        node = producer(tensor)
        if node is None or node.op not in ("Add", "Sub", "Mul", "Div", "Identity") or node.domain:
            return None
        if node.op == "Identity":
            tensor = node.inputs[0]
            continue
        left = fold(node.inputs[0])
        constant = left if left is not None else fold(node.inputs[1])
        if constant is None or constant.overridable or (left is not None and node.op in ("Div", "Sub")):
            return None
        numbers = constant.load()
        if numbers.size not in (1, second.d_in) or (numbers.size > 1 and numbers.shape[-1] != second.d_in):
            return None
        if not keeps_rank(node.inputs[1] if left is not None else node.inputs[0], numbers.shape):
            return None
        numbers = np.broadcast_to(numbers.reshape(-1).astype(np.float64), (second.d_in,))
        # what comes later is already in scale and shift: z ↦ (z·m + a)·scale + shift
        scale = np.ones(second.d_in) if scale is None else scale
        shift = np.zeros(second.d_in) if shift is None else shift
        if node.op in ("Add", "Sub"):
            shift = shift + (numbers if node.op == "Add" else -numbers) * scale
        else:
            scale = scale * numbers if node.op == "Mul" else scale / numbers
        tensor = node.inputs[1] if left is not None else node.inputs[0]
    return None


def _reason_against(pair: _Pair) -> str | None:
    """Why the pair stays two, "" where that goes without saying, None where it can be fused."""
    first, second = pair.first, pair.second
    if first.packed or second.packed or first.gathered or second.gathered or first.fused_activation:
        return ""
    if first.d_in * second.d_out >= first.d_out * (first.d_in + second.d_out):
        return ""
    if first.onnx_type != second.onnx_type or first.onnx_type not in FLOATS:
        return "the two matrices have different types"
    if first.quantized or second.quantized:
        return "one of the two matrices is quantized"
    if first.overridable or second.overridable:
        return "one of the two matrices is an input that the caller may override"
    size = first.d_in * second.d_out
    if size * numpy_type(first.onnx_type).itemsize > released_bytes(first, second):
        return "a matrix is shared with something that stays, so that the file would grow"
    return _reason_by_size(pair)


def _reason_by_size(pair: _Pair) -> str | None:
    """Why the product may not fit its type: ``|(W₁ diag(s) W₂)ᵢⱼ| ≤ ‖W₁ᵢ ∘ s‖ ‖W₂ⱼ‖``."""
    limits = ml_dtypes.finfo(numpy_type(pair.first.onnx_type))
    with np.errstate(all="ignore"):
        largest = Weight.of(pair.first).longest(1, pair.scale) * Weight.of(pair.second).longest(0)
    if not largest <= float(limits.max):
        return "the product of the two matrices may be too large for their type"
    if 0 < largest < 16 * float(limits.smallest_normal):
        return "the product of the two matrices is too small for their type"
    return None


def _fuse(model: Model, path: str, graph: gs.Graph, pair: _Pair) -> Linear | None:
    first, second = pair.first, pair.second
    build = Builder(model, graph, _prefix(first, second), first.onnx_type)
    scale, shift = pair.scale, pair.shift
    bias = _fused_bias(first, second, scale, shift)
    if bias is not None and not np.isfinite(bias).all():
        return None

    weight = _product(first, scale, second)
    y = build.linear(first.input, weight, bias, hint="fused")
    old = producer(second.output)
    take_over(second.output, y)
    remove_dead(graph, [old] if old is not None else [])
    node = producer(second.output)
    if node is not None and node.op == "Add":
        node = producer(node.inputs[0])
    return read_linear(node) if node is not None else None


def _product(first: Linear, scale: Array | None, second: Linear) -> ComputedValues:
    """``W₁ diag(s) W₂``, some rows at a time where W₁ allows it."""
    left, right = Weight.of(first), Weight.of(second)
    step = max(1, _TILE // first.d_out)

    def part(matrix: Array) -> Array:
        return right.after(matrix if scale is None else matrix * scale)

    def rows(start: int, stop: int) -> Array:
        return np.concatenate([part(left.rows(low, min(low + step, stop))) for low in range(start, stop, step)])

    return ComputedValues((first.d_in, second.d_out), first.onnx_type, lambda: part(left.load().astype(np.float64)),
                          rows if left.by_rows else None)


def _fused_bias(first: Linear, second: Linear, scale: Array | None, shift: Array | None) -> Array | None:
    """``(b₁ ∘ s + t) W₂ + b₂`` in float64, or None where all of it is absent."""
    inner: Array | None = None
    if first.bias is not None:
        inner = first.bias().astype(np.float64) * (1 if scale is None else scale)
    if shift is not None and shift.any():
        inner = shift if inner is None else inner + shift
    total = None if inner is None else Weight.of(second).after(inner)
    if second.bias is not None:
        total = second.bias().astype(np.float64) + (0 if total is None else total)
    return total


def _prefix(first: Linear, second: Linear) -> str:
    """The common path of the names of two nodes."""
    common = []
    for a, b in zip(first.node.name.split("/"), second.node.name.split("/"), strict=False):
        if a != b:
            break
        common.append(a)
    return "/".join(common) or first.node.name or "fused"

