"""What a graph must be before anything is done with it: every value defined once, before it is read, no cycle."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from os import PathLike
from typing import Any

import onnx

from .errors import InputError


def check_structure(graph: onnx.GraphProto, where: str | PathLike[str]) -> None:
    """Check names and wiring of ``graph`` and of every graph inside it. The order of nodes does not matter.

    Raises:
        InputError: a value is defined twice or never, or nodes form a cycle.
    """
    _check(graph, frozenset(), str(where))


def _check(graph: onnx.GraphProto, outer: frozenset[str], where: str) -> None:
    given = [info.name for info in graph.input]
    constants = [tensor.name for tensor in graph.initializer]
    constants += [tensor.values.name for tensor in graph.sparse_initializer]
    defined = set(given) | set(constants)
    if len(set(given)) < len(given) or len(set(constants)) < len(constants):
        name = next(name for names in (given, constants) for name in names if names.count(name) > 1)
        raise InputError(f"{where}: the value '{name}' is defined twice: export the model again")
    producer: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in node.output:
            if not name:
                continue
            if name in defined or name in producer:
                raise InputError(f"{where}: the value '{name}' is defined twice (node '{_title(node)}'): "
                                 "export the model again")
            producer[name] = number
    visible = outer | defined | set(producer)
    for node in graph.node:
        for name in node.input:
            if name and name not in visible:
                raise InputError(f"{where}: node '{_title(node)}' reads '{name}', which nothing defines: "
                                 "export the model again")
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _check(inner, visible, where)
    for info in graph.output:
        if info.name not in visible:
            raise InputError(f"{where}: the output '{info.name}' is computed by no node: export the model again")
    _check_acyclic(graph, producer, where)


def _check_acyclic(graph: onnx.GraphProto, producer: dict[str, int], where: str) -> None:
    waits = [0] * len(graph.node)
    consumers: list[list[int]] = [[] for _ in graph.node]
    for number, node in enumerate(graph.node):
        for source in {producer[name] for name in reads(node) if name in producer}:
            waits[number] += 1
            consumers[source].append(number)
    ready = [number for number, count in enumerate(waits) if not count]
    done = 0
    while ready:
        done += 1
        for number in consumers[ready.pop()]:
            waits[number] -= 1
            if not waits[number]:
                ready.append(number)
    if done < len(graph.node):
        stuck = next(node for node, count in zip(graph.node, waits, strict=True) if count)
        raise InputError(f"{where}: the graph has a cycle through node '{_title(stuck)}': export the model again")


def reads(node: onnx.NodeProto) -> set[str]:
    """Names that ``node`` may read: its inputs and all names read inside its subgraphs."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            local = {name for other in inner.node for name in other.output} | {info.name for info in inner.input}
            inside = {info.name for info in inner.output}
            for other in inner.node:
                inside |= reads(other)
            found |= inside - local
    return found


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put the nodes of ``graph``, and of the graphs inside it, after the producers of what they read."""
    producer = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    waits = [0] * len(graph.node)
    consumers: list[list[int]] = [[] for _ in graph.node]
    for number, node in enumerate(graph.node):
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                sort_nodes(inner)
        for source in {producer[name] for name in reads(node) if name in producer}:
            waits[number] += 1
            consumers[source].append(number)
    ready = [number for number, count in enumerate(waits) if not count]
    order = []
    while ready:
        number = heapq.heappop(ready)
        order.append(number)
        for other in consumers[number]:
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, other)
    if order != list(range(len(graph.node))):
        nodes = [graph.node[number] for number in order]
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def prune(graph: onnx.GraphProto, outputs: set[str], fed: Mapping[str, int] | None = None) -> None:
    """Leave of ``graph`` only what the values called ``outputs`` need.

    Args:
        fed: values that become inputs, with their element types. Its own inputs stay, or with ``fed`` those that are needed.
    """
    given = fed or {}
    producer = {name: node for node in graph.node for name in node.output if name and name not in given}
    pending = list(outputs)
    needed, kept = set(outputs), set()
    while pending:
        node = producer.get(pending.pop())
        if node is None or id(node) in kept:
            continue
        kept.add(id(node))
        new = {name for name in reads(node) if name} - needed
        needed |= new
        pending += new
    found = {info.name for info in graph.output}
    _keep(graph.node, [id(node) in kept for node in graph.node])
    defaults = {info.name for info in graph.input} if fed is None else set()
    _keep(graph.initializer, [tensor.name in needed or tensor.name in defaults for tensor in graph.initializer])
    _keep(graph.output, [info.name in outputs for info in graph.output])
    if fed is not None:
        _keep(graph.input, [info.name in needed for info in graph.input])
        known = {info.name for info in graph.input}
        graph.input.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in fed.items()
                           if name in needed and name not in known)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs - found)


def _keep(items: Any, wanted: list[bool]) -> None:
    copies = [type(item).FromString(item.SerializeToString()) for item, keep in zip(items, wanted, strict=True) if keep]
    del items[:]
    items.extend(copies)


def _title(node: onnx.NodeProto) -> str:
    return str(node.name or node.op_type)
