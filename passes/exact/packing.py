"""The part of a graph that can work on the tokens that are no padding alone, and the edit that makes it do so.

    real  = mask ≠ 0, and the very first token                          [batch · tokens]
    index = the positions of real, place = how many are real up to each, less 1
    pack    x [batch, tokens, d]  →  x[index]        [1, n, d]          n = Σ real
    unpack  x [1, n, d]           →  x[place]        [batch, tokens, d]
    and [batch · tokens, d]  ⇄  [n, d] in the same way; a Reshape between the two forms goes between the packed ones

A row of padding holds that of the token before it after ``unpack``: a finite number, which nothing may read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.edit import consumers, is_output, producer, set_input
from ...graph.model import Model
from ...graph.sort import topological
from ...graph.token_wise import ROWS, Kind, is_product, is_token_wise

KindOf = Callable[[gs.Tensor], Kind]
_END = (1 << 63) - 1


def packable(graph: gs.Graph, kind: KindOf, opset: int) -> list[gs.Node]:
    """Nodes that can work on packed rows and are worth it, in order of execution.

    That is every product with a matrix, what lies between two of them, and what follows from those alone. What is in front of the
    first and adds several values up stays, as each of them would have to be packed.
    """
    nodes = [node for node in topological(graph.nodes) if is_token_wise(node, kind, opset)]
    chosen: dict[int, gs.Node] = {}
    for node in reversed(nodes):
        read_by = [reader for output in node.outputs if kind(output) in ROWS for reader in consumers(output)]
        if is_product(node) or any(id(reader) in chosen for reader in read_by):
            chosen[id(node)] = node
    for node in nodes:
        inside = [id(producer(tensor)) in chosen for tensor in rows_in(node, kind)]
        if id(node) in chosen and not is_product(node) and len(inside) > 1 and not any(inside):
            del chosen[id(node)]
        elif id(node) not in chosen and all(inside):
            chosen[id(node)] = node
    return [node for node in nodes if id(node) in chosen]


def rows_in(node: gs.Node, kind: KindOf) -> list[gs.Tensor]:
    """The inputs of ``node`` that hold a row for each token, each once."""
    return list({id(tensor): tensor for tensor in node.inputs if kind(tensor) in ROWS}.values())


@dataclass(frozen=True)
class Packer:
    """Packs and unpacks values of one graph by one mask.

    Attributes:
        mask: ``[batch, tokens]``, 0 where a token is padding.
        width: d of a value.
        following: rows of padding hold the token behind them and not the one before: to see whether anything reads them.
    """

    model: Model
    graph: gs.Graph
    mask: gs.Tensor
    kind: KindOf
    width: Callable[[gs.Tensor], int]
    following: bool = False

    def pack(self, nodes: Sequence[gs.Node]) -> None:
        """Let ``nodes`` work on packed rows."""
        inside = {id(node) for node in nodes}
        read = [(node, index, tensor) for node in nodes for index, tensor in enumerate(node.inputs) if self.kind(tensor) in ROWS]
        packed: dict[int, gs.Tensor] = {}
        like: dict[object, gs.Tensor] = {}  # of each form and width, a value whose rows stay as they were
        for _, _, tensor in read:
            if id(tensor) not in packed and id(producer(tensor)) not in inside:
                packed[id(tensor)] = self._packed(tensor)
                like.setdefault(self._form(tensor), tensor)
        targets = {id(node): [*([1] if self.kind(node.outputs[0]) is Kind.TOKENS else []), -1, self.width(node.outputs[0])]
                   for node in nodes if node.op == "Reshape"}
        for node in nodes:
            for index, tensor in enumerate(node.outputs):
                if tensor.name and self.kind(tensor) in ROWS:
                    packed[id(tensor)] = self._given(node, index, inside, like)
        for node, index, tensor in read:
            set_input(node, index, packed[id(tensor)])
        for node in nodes:
            if node.op == "Reshape":
                set_input(node, 1, self._build.integers(targets[id(node)], "packed_shape"))

    def _form(self, tensor: gs.Tensor) -> object:
        return self.kind(tensor), self.width(tensor)

    def _packed(self, tensor: gs.Tensor) -> gs.Tensor:
        index = self._index if self.kind(tensor) is Kind.TOKENS else self._flat_index
        return self._build.op("Gather", self._flat(tensor, tensor), index, hint="packed", axis=0)

    def _flat(self, tensor: gs.Tensor, like: gs.Tensor) -> gs.Tensor:
        """The rows of ``tensor``, which are those of ``like``, one below the other."""
        if self.kind(like) is Kind.FLAT:
            return tensor
        return self._build.op("Reshape", tensor, self._build.integers([-1, self.width(like)], "flat"), hint="rows")

    def _given(self, node: gs.Node, index: int, inside: set[int], like: dict[object, gs.Tensor]) -> gs.Tensor:
        """What ``node`` gives from now on, packed. The value it gave before is unpacked from that, where anything reads it."""
        tensor = node.outputs[index]
        for reader in consumers(tensor):
            if reader.op == "Shape" and self._form(tensor) in like:
                set_input(reader, 0, like[self._form(tensor)])
        packed = gs.Variable(self.model.names.fresh(f"{tensor.name}_packed"), dtype=tensor.dtype)
        list.__setitem__(node.outputs, index, packed)
        list.append(packed.inputs, node)
        list.clear(tensor.inputs)
        if is_output(self.graph, tensor) or any(id(reader) not in inside for reader in consumers(tensor)):
            place = self._place if self.kind(tensor) is Kind.TOKENS else self._flat_place
            self._build.nodes("Gather", [self._flat(packed, tensor), place], [tensor], hint="unpacked", axis=0)
        return packed

    @cached_property
    def _build(self) -> Builder:
        return Builder(self.model, self.graph, "/packed")

    @cached_property
    def _real(self) -> gs.Tensor:
        build = self._build
        flat = build.op("Reshape", self.mask, build.integers([-1], "all"), hint="mask")
        kept = build.op("Cast", flat, hint="kept", to=int(onnx.TensorProto.BOOL))
        zero, one, end = (build.integers([number], hint) for number, hint in ((0, "zero"), (1, "one"), (_END, "end")))
        first = build.op("Slice", kept, zero, one, hint="first")
        there = build.op("Or", first, build.op("Not", first, hint="not_first"), hint="there")  # true; nothing of an empty batch
        return build.op("Concat", there, build.op("Slice", kept, one, end, hint="rest"), hint="real", axis=0)

    @cached_property
    def _index(self) -> gs.Tensor:
        return self._build.op("NonZero", self._real, hint="index")

    @cached_property
    def _flat_index(self) -> gs.Tensor:
        return self._build.op("Reshape", self._index, self._build.integers([-1], "list"), hint="flat_index")

    @cached_property
    def _place(self) -> gs.Tensor:
        return self._build.op("Reshape", self._flat_place, self._build.op("Shape", self.mask, hint="sizes"), hint="places")

    @cached_property
    def _flat_place(self) -> gs.Tensor:
        build = self._build
        ones = build.op("Cast", self._real, hint="ones", to=int(onnx.TensorProto.INT64))
        axis, one = build.constant(np.asarray(0, np.int64), "axis"), build.integers([1], "one")
        counted = build.op("CumSum", ones, axis, hint="counted")
        place = build.op("Sub", counted, one, hint="place")
        if not self.following:
            return place
        count = build.op("ReduceMax", counted, hint="count", keepdims=1)
        return build.op("Where", self._real, place, build.op("Mod", counted, count, hint="next"), hint="following")
