"""dedupe-weights: the same numbers, stored once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx
import onnx_graphsurgeon as gs

from ..graph.edit import consumers, is_output, remove_dead, set_input
from ..graph.model import Model
from ..graph.scope import shadowed_names
from ..graph.weights import ComputedValues, Values
from .base import Context, Pass, PassResult, Refused

_SAMPLE = 4096  # bytes compared before two weights are read whole


@dataclass(frozen=True)
class DedupeWeights(Pass):
    """Share initializers whose type, shape and bytes are equal.

        y = f(x, W₁), z = g(x, W₂), W₁ ≡ W₂ byte for byte   →   y = f(x, W₁), z = g(x, W₁)

    Exporters write a tied weight once for each use, and merged decoders once for each branch. A weight in an inner graph
    gives way to its twin in a graph around it. Weights are compared by their first 4 KB, then by SHA-256; none is held in
    memory. Constant nodes count as initializers do.

    Does not fire on an initializer that is an input (the caller may override one and not the other) or an output, nor on
    strings; nor on weights that differ in a single bit, such as −0 and 0. What a Constant node holds inside an inner graph
    stays there.
    """

    name: ClassVar[str] = "dedupe-weights"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Share what is equal, graph after graph, outermost first."""
        shadowed = shadowed_names(model.graphs())
        groups: dict[tuple[Any, ...], list[_Holder]] = {}
        for path, graph in model.graphs():
            for holder in _holders(path, graph):
                groups.setdefault((holder.values.onnx_type, holder.values.shape), []).append(holder)
        fired = 0
        refused = []
        for group in groups.values():
            if len(group) < 2:
                continue
            for twins in _equal(group):
                for keeper, twin in _pairs(twins):
                    if keeper.tensor.name in shadowed:
                        refused.append(Refused("its name means another value in an inner graph", keeper.tensor.name))
                        continue
                    _share(keeper, twin)
                    fired += 1
        return self.result(fired, refused)


@dataclass
class _Holder:
    """A value that holds a weight: an initializer, or the output of a Constant node."""

    path: str
    graph: gs.Graph
    tensor: gs.Tensor
    values: Values
    node: gs.Node | None = None


def _holders(path: str, graph: gs.Graph) -> Iterator[_Holder]:
    read = [constant for constant in graph.constants if constant.outputs]
    made = {id(tensor): tensor for node in graph.nodes for tensor in node.inputs
            if isinstance(tensor, gs.Constant) and getattr(tensor, "home", None) is graph}
    for constant in {**{id(constant): constant for constant in read}, **made}.values():
        if _comparable(constant._values):
            yield _Holder(path, graph, constant, constant._values)
    for node in graph.nodes:
        held = node.attrs.get("value") if node.op == "Constant" and not node.domain else None
        if isinstance(held, gs.Constant) and _comparable(held._values) and node.outputs[0].outputs:
            yield _Holder(path, graph, node.outputs[0], held._values, node)


def _comparable(values: Values) -> bool:
    """Whether the bytes can be compared at no great cost. What a pass computes is not computed for that."""
    return not isinstance(values, ComputedValues) and values.nbytes > 0 and values.onnx_type != onnx.TensorProto.STRING


def _equal(group: list[_Holder]) -> Iterator[list[_Holder]]:
    """Those of ``group``, which have one type and shape, whose bytes are equal."""
    alike: dict[bytes, list[_Holder]] = {}
    for holder in group:
        alike.setdefault(bytes(next(iter(holder.values.tiles(_SAMPLE)))), []).append(holder)
    for candidates in alike.values():
        if len(candidates) < 2:
            continue
        if candidates[0].values.nbytes <= _SAMPLE:
            yield candidates
            continue
        equal: dict[bytes, list[_Holder]] = {}
        for holder in candidates:
            equal.setdefault(holder.values.digest(), []).append(holder)
        yield from (twins for twins in equal.values() if len(twins) > 1)


def _pairs(twins: list[_Holder]) -> Iterator[tuple[_Holder, _Holder]]:
    """Which of ``twins`` takes the place of which: in the same graph, or an initializer in a graph around."""
    outputs = [twin for twin in twins if is_output(twin.graph, twin.tensor)]
    bound = {id(twin) for twin in outputs}
    kept: list[_Holder] = []
    for twin in twins:
        keeper = None if id(twin) in bound else next((one for one in (*kept, *outputs) if _may_stand_for(one, twin)), None)
        if keeper is None:
            kept.append(twin)
        else:
            yield keeper, twin


def _may_stand_for(keeper: _Holder, twin: _Holder) -> bool:
    around = keeper.node is None and twin.node is None and twin.path.startswith(f"{keeper.path}/")
    return (keeper.graph is twin.graph or around) and bool(keeper.tensor.outputs)


def _share(keeper: _Holder, twin: _Holder) -> None:
    for reader in consumers(twin.tensor):
        for index, tensor in enumerate(reader.inputs):
            if tensor is twin.tensor:
                set_input(reader, index, keeper.tensor)
    if twin.node is not None:
        remove_dead(twin.graph, [twin.node])
