"""Write the editing view back: what no pass touched comes from the original proto, the rest from the view."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from .sort import topological
from .view import Opaque, operator_name, signature
from .weights import Values, tensor_proto


class Exporter:
    """Turns views into protos and remembers the large weights that new tensors stand for.

    Attributes:
        values: stub key → weight, for the tensors this exporter made (add them to those of the stored model).
    """

    def __init__(self) -> None:
        self.values: dict[str, Values] = {}

    def graph(self, view: gs.Graph) -> onnx.GraphProto:
        """The proto of ``view``; the very proto it was imported from when nothing in it changed."""
        return self._graph(view)[0]

    def _graph(self, view: gs.Graph) -> tuple[onnx.GraphProto, bool]:
        original: onnx.GraphProto = view.origin
        exported = [self._node(node) for node in view.nodes]
        untouched = not view.swept and len(exported) == len(original.node) and all(
            not changed and node.origin.proto is proto
            for node, (_, changed), proto in zip(view.nodes, exported, original.node, strict=True))
        if untouched:
            return original, False
        by_node = {id(node): result for node, result in zip(view.nodes, exported, strict=True)}
        proto = onnx.GraphProto()
        proto.CopyFrom(original)
        for field in ("node", "initializer", "value_info"):
            proto.ClearField(field)
        proto.node.extend(by_node[id(node)][0] for node in topological(view.nodes))
        proto.initializer.extend(self._initializers(view))
        kept = {tensor.name for node in view.nodes if not by_node[id(node)][1] and not getattr(node, "reshaped", False)
                for tensor in node.outputs}
        kept |= {info.name for info in original.input}
        kept |= {tensor.name for tensor in proto.initializer}
        proto.value_info.extend(info for info in original.value_info if info.name in kept)
        return proto, True

    def _initializers(self, view: gs.Graph) -> Iterable[onnx.TensorProto]:
        """The original ones that are in use or never were, in their order, then the new ones in order of use."""
        used = {id(constant): constant for constant in constants_read(view.nodes)}
        outputs = {tensor.name for tensor in view.outputs}
        imported = {constant.name: constant for constant in view.constants}
        for tensor in view.origin.initializer:
            constant = imported.get(tensor.name)
            if constant is None or id(constant) in used or tensor.name in outputs or not constant.was_used or getattr(
                    constant, "captured", False):
                yield tensor
        for constant in used.values():
            if constant.home is view and imported.get(constant.name) is not constant:
                yield self._tensor(constant.name, constant._values)

    def _node(self, node: gs.Node) -> tuple[onnx.NodeProto, bool]:
        inner = {key: self._graph(value) for key, value in node.attrs.items() if isinstance(value, gs.Graph)}
        origin = getattr(node, "origin", None)
        if origin is not None and origin.signature == signature(node) and not any(changed for _, changed in inner.values()):
            return origin.proto, False
        proto = onnx.NodeProto(op_type=operator_name(node), name=node.name, domain=node.domain or "")
        before: dict[str, onnx.AttributeProto] = {}
        if origin is not None:
            proto.CopyFrom(origin.proto)
            proto.op_type, proto.name, proto.domain = operator_name(node), node.name, node.domain or ""
            before = {attribute.name: attribute for attribute in origin.proto.attribute}
            for field in ("input", "output", "attribute"):
                proto.ClearField(field)
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        kept = dict(origin.signature[5]) if origin is not None else {}
        now = dict(signature(node)[5])
        for key, value in node.attrs.items():
            if key in inner:
                proto.attribute.append(onnx.helper.make_attribute(key, inner[key][0]))
            elif key in before and kept.get(key) == now[key]:
                proto.attribute.append(before[key])
            else:
                proto.attribute.append(self._attribute(key, value))
        return proto, True

    def _attribute(self, key: str, value: Any) -> onnx.AttributeProto:
        if isinstance(value, Opaque):
            attribute = onnx.AttributeProto()
            attribute.CopyFrom(value.proto)
            return attribute
        if isinstance(value, gs.Constant):
            return onnx.helper.make_attribute(key, self._tensor(value.name, value._values))
        if isinstance(value, list) and not value:
            return onnx.AttributeProto(name=key, type=onnx.AttributeProto.INTS)
        return onnx.helper.make_attribute(key, value)

    def _tensor(self, name: str, values: Values) -> onnx.TensorProto:
        tensor, key = tensor_proto(name, values)
        if key is not None:
            self.values[key] = values
        return tensor


def constants_read(nodes: Iterable[gs.Node]) -> Iterator[gs.Constant]:
    """Every constant that ``nodes`` read, also from inside their subgraphs, in order of use (with repeats)."""
    for node in nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                yield tensor
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from constants_read(value.nodes)
                yield from (tensor for tensor in value.outputs if isinstance(tensor, gs.Constant))
