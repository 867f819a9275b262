"""merge-linears: linears that read the same value become one wider linear and a Split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.constant import Folded, fold
from ..graph.edit import remove_dead, take_over
from ..graph.linear import Linear, read_linear
from ..graph.model import Model
from ..graph.sort import topological
from ..graph.types import FLOATS, numpy_type
from .base import Context, Pass, PassResult, Refused
from .exact.cost import released_bytes
from .exact.fusions import what_it_costs
from .exact.sharing import is_read_elsewhere, is_shared, shows_inside
from .exact.side_by_side import side_by_side


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Merge linears that read the same value (gate and up; Q, K and V) into one wider linear and a Split.

        y₁ = x W₁ + b₁, y₂ = x W₂ + b₂   →   y₁, y₂ = Split(x [W₁ W₂] + [b₁ b₂])

    Only with ``force``: on the CPU ONNX Runtime is nowhere measured to be faster for it, as the Split copies what the
    linears wrote in place (``benchmarks/merge_linears.py``). Numbers are the same but for the order of sums.

    Does not fire, even so, on a linear whose weight or bias is shared, quantized, packed, stored in fewer bits than it is
    used in, or an input that the caller may override; nor where ONNX Runtime would lose a fusion (of a bias with an
    activation, of attention), which it is asked about.
    """

    name: ClassVar[str] = "merge-linears"
    exact: ClassVar[bool] = True
    force: bool = field(default=False, metadata={"help": "merge although ONNX Runtime is not measured to be faster for it"})

    def run(self, model: Model, context: Context) -> PassResult:
        """Merge every group, or say why not."""
        fired = 0
        refused = []
        for path, graph in model.graphs():
            for group in list(_groups(model, graph)):
                value = group[0].input.name
                reason = _reason_against(model, path, group, context) if self.force else (
                    f"ONNX Runtime is not measured to be faster for {len(group)} linears in one (force=true merges them)")
                if reason is not None:
                    refused.append(Refused(reason, value))
                    continue
                _merge(model, graph, group)
                fired += 1
        return self.result(fired, refused)


def _groups(model: Model, graph: gs.Graph) -> Iterator[list[Linear]]:
    """Linears of one form that read one value, two or more."""
    found: dict[tuple[object, ...], list[Linear]] = {}
    for node in topological(graph.nodes):
        linear = read_linear(node)
        if linear is not None and _can_be_merged(model, graph, linear):
            form = (id(linear.input), linear.kind, bool(node.attrs.get("transB", 0)), linear.bias is not None, linear.onnx_type)
            found.setdefault(form, []).append(linear)
    return (group for group in found.values() if len(group) > 1)


def _can_be_merged(model: Model, graph: gs.Graph, linear: Linear) -> bool:
    node = linear.node
    if linear.kind not in ("MatMul", "Gemm") or linear.axis != -1 or linear.packed or linear.gathered:
        return False
    if linear.quantized or linear.overridable or linear.onnx_type not in FLOATS:
        return False
    if is_shared(linear) or shows_inside(graph, linear):
        return False
    if node.attrs.get("transA", 0) or any(node.attrs.get(key, 1.0) != 1 for key in ("alpha", "beta")):
        return False
    weight = fold(node.inputs[1])
    size = linear.d_in * linear.d_out * numpy_type(linear.onnx_type).itemsize
    if weight is None or len(weight.shape) != 2 or released_bytes(linear) < size:
        return False
    if model.opset < 11 and _rank(linear) is None:
        return False
    return linear.bias is None or _bias(linear) is not None


def _bias(linear: Linear) -> Folded | None:
    """The bias, where it is a list of one number a feature that nothing else reads."""
    last = linear.nodes[-1]
    places = [(last, 0), (last, 1)] if last is not linear.node else [(last, 2)]
    for node, index in places:
        folded = fold(node.inputs[index])
        if folded is None or folded.shape != (linear.d_out,):
            continue
        if folded.overridable or is_read_elsewhere(node, index) or folded.onnx_type != linear.onnx_type:
            return None
        stored = folded.sources[0]._values.nbytes if folded.sources else 0
        return folded if stored >= linear.d_out * numpy_type(linear.onnx_type).itemsize else None
    return None


def _rank(linear: Linear) -> int | None:
    if linear.kind == "Gemm":
        return 2
    return len(linear.input.shape) if linear.input.shape else None


def _reason_against(model: Model, path: str, group: list[Linear], context: Context) -> str | None:
    names = [linear.output.name for linear in group]

    def rewrite(trial: Model) -> bool:
        graph = dict(trial.graphs())[path]
        twin = next((each for each in _groups(trial, graph) if [linear.output.name for linear in each] == names), None)
        if twin is not None:
            _merge(trial, graph, twin)
        return twin is not None

    form = (group[0].kind, group[0].bias is not None, tuple((linear.d_in, linear.d_out) for linear in group))
    around = [linear.output for linear in group] if path == "main" else []
    return what_it_costs(model, around, rewrite, context, new=["Split"], form=(path, form))


def _merge(model: Model, graph: gs.Graph, group: list[Linear]) -> None:
    first = group[0]
    build = Builder(model, graph, _prefix(group), first.onnx_type)
    axis = 0 if first.node.attrs.get("transB", 0) else 1
    weights = [folded for folded in (fold(linear.node.inputs[1]) for linear in group) if folded is not None]
    biases = [folded for folded in map(_bias, group) if folded is not None] if first.bias is not None else []
    weight = build.constant(side_by_side(weights, axis), "weight")
    bias = [build.constant(np.concatenate([folded.load() for folded in biases]), "bias")] if biases else []
    if first.kind == "Gemm":
        attrs = {key: value for key, value in first.node.attrs.items() if key == "transB"}
        merged = build.op("Gemm", first.input, weight, *bias, hint="merged", **attrs)
    else:
        merged = build.op("MatMul", first.input, weight, hint="merged")
        for constant in bias:
            merged = build.op("Add", merged, constant, hint="merged_bias")
    _split(model, build, merged, group)
    remove_dead(graph, [linear.nodes[-1] for linear in group])


def _split(model: Model, build: Builder, merged: gs.Tensor, group: list[Linear]) -> None:
    """Let a Split of ``merged`` give what the linears of ``group`` gave."""
    widths = [linear.d_out for linear in group]
    attrs: dict[str, Any] = {"axis": -1 if model.opset >= 11 else (_rank(group[0]) or 0) - 1}
    inputs: list[gs.Tensor] = [merged]
    if len(set(widths)) > 1 and model.opset >= 13:
        inputs.append(build.integers(widths, "widths"))
    elif len(set(widths)) > 1:
        attrs["split"] = widths
    elif model.opset >= 18:
        attrs["num_outputs"] = len(group)
    parts: list[gs.Tensor] = [build.value(f"part_{number}") for number in range(len(group))]
    build.nodes("Split", inputs, parts, hint="split", **attrs)
    for linear, part in zip(group, parts, strict=True):
        take_over(linear.output, part)


def _prefix(group: list[Linear]) -> str:
    """The common path of the nodes' names."""
    common = []
    for parts in zip(*(linear.node.name.split("/") for linear in group), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "/".join(common) or "merged"
