"""A topological sort that keeps the given order where it can, without recursion.

onnx-graphsurgeon's ``toposort`` recurses and fails on a few thousand shuffled nodes.
"""

from __future__ import annotations

import heapq

import onnx_graphsurgeon as gs

from .errors import InputError


def reads(node: gs.Node) -> list[gs.Tensor]:
    """Every value ``node`` needs: its inputs, and what the graphs inside it read from outside."""
    found = [tensor for tensor in node.inputs if tensor.name]
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            found += [tensor for inner in value.nodes for tensor in reads(inner)]
            found += value.outputs
    return found


def topological(nodes: list[gs.Node]) -> list[gs.Node]:
    """``nodes`` so that each comes after the producers of what it reads; earliest given position first.

    Raises:
        InputError: the nodes form a cycle.
    """
    producer = {id(tensor): i for i, node in enumerate(nodes) for tensor in node.outputs if tensor.name}
    waits = [0] * len(nodes)
    consumers: list[list[int]] = [[] for _ in nodes]
    in_order = True
    for i, node in enumerate(nodes):
        for j in {producer[id(tensor)] for tensor in reads(node) if id(tensor) in producer}:
            waits[i] += 1
            consumers[j].append(i)
            in_order &= j < i
    if in_order:
        return list(nodes)
    ready = [i for i, count in enumerate(waits) if not count]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(nodes[i])
        for j in consumers[i]:
            waits[j] -= 1
            if not waits[j]:
                heapq.heappush(ready, j)
    if len(order) < len(nodes):
        stuck = next(node for i, node in enumerate(nodes) if waits[i])
        raise InputError(f"the graph has a cycle through node '{stuck.name or stuck.op}': export the model again")
    return order
