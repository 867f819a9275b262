"""Edits of the view that onnx-graphsurgeon does by comparing whole nodes: here by identity, in linear time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_graphsurgeon as gs

from .sort import reads

_SHORT = 64  # readers of one value


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read ``tensor``, each once. A node whose subgraph reads it counts by the inner node."""
    return list({id(node): node for node in tensor.outputs}.values())


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes ``tensor``, or None for an input or a constant."""
    return tensor.inputs[0] if tensor.inputs else None


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Let input ``index`` of ``node`` be ``tensor``."""
    old = node.inputs[index]
    list.__setitem__(node.inputs, index, tensor)
    _forget(old.outputs, node)
    list.append(tensor.outputs, node)


def set_inputs(node: gs.Node, tensors: Iterable[gs.Tensor]) -> None:
    """Let the inputs of ``node`` be ``tensors``."""
    for old in list(node.inputs):
        _forget(old.outputs, node)
    list.clear(node.inputs)
    for tensor in tensors:
        list.append(node.inputs, tensor)
        list.append(tensor.outputs, node)


def replace_uses(old: gs.Tensor, new: gs.Tensor, *, except_in: Iterable[gs.Node] = ()) -> None:
    """Let every node that reads ``old`` read ``new`` instead. Graph outputs are not nodes: see :func:`substitute`."""
    kept = {id(node) for node in except_in}
    for node in consumers(old):
        if id(node) not in kept:
            for index, tensor in enumerate(node.inputs):
                if tensor is old:
                    set_input(node, index, new)


def substitute(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor) -> None:
    """Put ``new`` in the place of ``old`` everywhere; where ``old`` is an output of ``graph`` its name stays.

    ``old`` loses its producer. When ``old`` is a graph output, the node that makes ``new`` makes ``old`` from now on
    (through an Identity where ``new`` is an input, a constant or an output itself).
    """
    node = producer(old)
    if not is_output(graph, old):
        replace_uses(old, new)
        old.replaced_by = new
        return
    if node is not None:
        index = next(i for i, tensor in enumerate(node.outputs) if tensor is old)
        list.__setitem__(node.outputs, index, gs.Variable.empty())
        list.clear(old.inputs)
    maker = producer(new)
    if maker is None or is_output(graph, new) or not any(n is maker for n in graph.nodes):
        graph.nodes.append(gs.Node("Identity", inputs=[new], outputs=[old]))
        return
    index = next(i for i, tensor in enumerate(maker.outputs) if tensor is new)
    list.__setitem__(maker.outputs, index, old)
    list.append(old.inputs, maker)
    list.clear(new.inputs)
    replace_uses(new, old)
    new.replaced_by = old


def take_over(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let the node that computes ``new`` compute ``old`` instead: ``old`` keeps its name and everything that reads it.

    ``new`` is gone then; what read it reads ``old``. The node that computed ``old`` before is left without that output.
    """
    before, maker = producer(old), producer(new)
    assert maker is not None
    if before is not None:
        list.__setitem__(before.outputs, next(i for i, t in enumerate(before.outputs) if t is old), gs.Variable.empty())
        list.clear(old.inputs)
    list.__setitem__(maker.outputs, next(i for i, t in enumerate(maker.outputs) if t is new), old)
    list.append(old.inputs, maker)
    list.clear(new.inputs)
    replace_uses(new, old)
    new.replaced_by = old


def current(tensor: gs.Tensor) -> gs.Tensor:
    """The value that stands where ``tensor`` stood, if it was replaced."""
    following = getattr(tensor, "replaced_by", None)
    while following is not None:
        tensor, following = following, getattr(following, "replaced_by", None)
    return tensor


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the name of ``tensor`` must stay: it is an output of ``graph``, or of a graph inside that gives it out as it is."""
    return getattr(tensor, "captured", False) or any(tensor is output for output in graph.outputs)


def remove_dead(graph: gs.Graph, seeds: Iterable[gs.Node], removable: Callable[[gs.Node], bool] = lambda node: True) -> int:
    """Remove those of ``seeds`` whose outputs nothing reads, then what only they read, and so on upwards.

    Nodes that were dead before and are not reached from ``seeds`` stay (``clean-up`` is the pass for those), as do those
    that are not ``removable``.

    Returns:
        The number of nodes removed.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    present = {id(node) for node in graph.nodes}
    pending = list(seeds)
    dead: dict[int, gs.Node] = {}
    lost: dict[int, int] = {}  # readers that a value has lost: the lists are mended once, at the end
    while pending:
        node = pending.pop()
        if id(node) in dead or id(node) not in present or not removable(node):
            continue
        if any(len(tensor.outputs) > lost.get(id(tensor), 0) or id(tensor) in outputs or getattr(tensor, "captured", False)
               for tensor in node.outputs):
            continue
        dead[id(node)] = node
        for each in _with_inner(node):
            for tensor in each.inputs:
                lost[id(tensor)] = lost.get(id(tensor), 0) + 1
        pending += [source for source in (producer(tensor) for tensor in reads(node)) if source is not None]
    if dead:
        _unwire([each for node in dead.values() for each in _with_inner(node)])
        graph.nodes = [node for node in graph.nodes if id(node) not in dead]
    return len(dead)


def _with_inner(node: gs.Node) -> list[gs.Node]:
    """``node`` and the nodes of the graphs inside it, at any depth."""
    found = [node]
    for each in found:  # grows while it is read
        found += [inner for value in each.attrs.values() if isinstance(value, gs.Graph) for inner in value.nodes]
    return found


def _unwire(nodes: list[gs.Node]) -> None:
    """Take ``nodes`` out of the wiring: no value lists them as producer or reader any more."""
    gone = {id(node) for node in nodes}
    values = {id(tensor): tensor for node in nodes for tensor in (*node.inputs, *node.outputs)}
    for tensor in values.values():
        for listed in (tensor.outputs, tensor.inputs):
            kept = [node for node in listed if id(node) not in gone]
            list.clear(listed)
            list.extend(listed, kept)
    for node in nodes:
        list.clear(node.inputs)
        list.clear(node.outputs)


def _forget(nodes: list[gs.Node], node: gs.Node) -> None:
    """Take ``node`` once from a list of readers or producers.

    Short lists keep their order. From a long one (a constant that thousands read) it is taken at its remembered place, into which
    the last one moves, so that taking all of them takes linear time.
    """
    if len(nodes) <= _SHORT:
        for index, other in enumerate(nodes):
            if other is node:
                list.__delitem__(nodes, index)
                return
        return
    places: dict[int, int] = getattr(nodes, "places", {})
    place = places.get(id(node), len(nodes))
    if place >= len(nodes) or nodes[place] is not node:
        places = {id(each): index for index, each in enumerate(nodes)}
        nodes.places = places  # type: ignore[attr-defined]
    if id(node) not in places:
        return
    place = places.pop(id(node))
    last = list.pop(nodes)
    if place < len(nodes):
        list.__setitem__(nodes, place, last)
        places[id(last)] = place
