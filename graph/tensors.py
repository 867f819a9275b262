"""Every tensor of a model, wherever it is: initializers, attributes, subgraphs, functions."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def initializers(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers of the main graph and of every graph inside it or inside a function."""
    yield from (tensor for tensor, attribute in tensors(model) if not attribute)


def tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every tensor, and whether it is the value of an attribute (and so not an initializer)."""
    graphs = [model.graph]
    nodes = [model.graph.node, *(function.node for function in model.functions)]
    for training in model.training_info:
        graphs += [training.initialization, training.algorithm]
        nodes += [training.initialization.node, training.algorithm.node]
    attributes = [function.attribute_proto for function in model.functions]
    while graphs or nodes or attributes:
        if graphs:
            yield from ((tensor, False) for tensor in graphs.pop().initializer)
        elif nodes:
            attributes += [node.attribute for node in nodes.pop() if node.attribute]
        else:
            for attribute in attributes.pop():
                if attribute.HasField("t"):
                    yield attribute.t, True
                for tensor in attribute.tensors:
                    yield tensor, True
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    graphs.append(graph)
                    nodes.append(graph.node)
