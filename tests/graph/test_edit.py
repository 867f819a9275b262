"""Edits of the wiring: right, and in linear time where thousands read one constant."""

from __future__ import annotations

import random
import time

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from ffnfold.graph.edit import consumers, remove_dead, replace_uses, set_input


def readers_of_one_constant(count: int) -> tuple[gs.Graph, gs.Constant]:
    """``count`` nodes that all read one input and one constant, in the main graph."""
    x, constant = gs.Variable("x", np.float32, [1]), gs.Constant("one", np.ones(1, np.float32))
    nodes = [gs.Node("Add", inputs=[x, constant], outputs=[gs.Variable(f"y{number}")]) for number in range(count)]
    return gs.Graph(nodes=nodes, inputs=[x], outputs=[]), constant


def in_any_order(nodes: list[gs.Node]) -> list[gs.Node]:
    nodes = list(nodes)
    random.Random(0).shuffle(nodes)
    return nodes


@pytest.mark.parametrize("count", [5, 500])
def test_a_reader_that_reads_something_else_is_listed_there_and_only_there(count):
    graph, constant = readers_of_one_constant(count)
    other = gs.Constant("two", np.ones(1, np.float32))
    moved = in_any_order(graph.nodes)[:count // 2]
    for node in moved:
        set_input(node, 1, other)
    assert {id(node) for node in constant.outputs} == {id(node) for node in graph.nodes} - {id(node) for node in moved}
    assert len(constant.outputs) == count - len(moved)
    assert {id(node) for node in other.outputs} == {id(node) for node in moved}


@pytest.mark.parametrize("count", [5, 500])
def test_a_node_that_reads_a_constant_twice_is_listed_twice_until_it_is_not(count):
    graph, constant = readers_of_one_constant(count)
    node = graph.nodes[count // 2]
    set_input(node, 0, constant)
    assert sum(reader is node for reader in constant.outputs) == 2
    set_input(node, 1, gs.Constant("two", np.ones(1, np.float32)))
    assert sum(reader is node for reader in constant.outputs) == 1
    assert len(consumers(constant)) == count


def test_readers_can_come_back():
    graph, constant = readers_of_one_constant(300)
    other = gs.Constant("two", np.ones(1, np.float32))
    for node in in_any_order(graph.nodes)[:200]:
        set_input(node, 1, other)
        set_input(node, 1, constant)
    assert sorted(id(node) for node in constant.outputs) == sorted(id(node) for node in graph.nodes)
    replace_uses(constant, other)
    assert not constant.outputs
    assert len(other.outputs) == 300


def test_what_nothing_reads_goes_with_what_only_it_read():
    x = gs.Variable("x", np.float32, [1])
    kept, shared, chain = (gs.Variable(name) for name in ("kept", "shared", "chain"))
    nodes = [gs.Node("Relu", inputs=[x], outputs=[shared]), gs.Node("Tanh", inputs=[shared], outputs=[chain]),
             gs.Node("Exp", inputs=[chain], outputs=[gs.Variable("dead")]), gs.Node("Abs", inputs=[shared], outputs=[kept])]
    graph = gs.Graph(nodes=list(nodes), inputs=[x], outputs=[kept])
    assert remove_dead(graph, [nodes[2], nodes[3]]) == 2
    assert [node.op for node in graph.nodes] == ["Relu", "Abs"]
    assert [node.op for node in shared.outputs] == ["Abs"]
    assert not chain.inputs
    assert not chain.outputs


def test_what_a_graph_inside_a_dead_node_read_is_read_no_more():
    x, outside = gs.Variable("x", np.float32, [1]), gs.Variable("outside")
    inner = gs.Graph(nodes=[gs.Node("Relu", inputs=[outside], outputs=[gs.Variable("z")])], name="branch")
    nodes = [gs.Node("Abs", inputs=[x], outputs=[outside]),
             gs.Node("If", inputs=[x], outputs=[gs.Variable("dead")], attrs={"then_branch": inner})]
    graph = gs.Graph(nodes=list(nodes), inputs=[x], outputs=[])
    assert remove_dead(graph, [nodes[1]]) == 2
    assert not outside.outputs
    assert not graph.nodes


def seconds(count: int) -> tuple[float, float]:
    """To remove all readers of a constant, and to let all of them read another, in any order."""
    graph, _ = readers_of_one_constant(count)
    nodes = in_any_order(graph.nodes)
    start = time.process_time()
    assert remove_dead(graph, nodes) == count
    middle = time.process_time()
    graph, _ = readers_of_one_constant(count)
    other = gs.Constant("two", np.ones(1, np.float32))
    nodes = in_any_order(graph.nodes)
    begin = time.process_time()
    for node in nodes:
        set_input(node, 1, other)
    return middle - start, time.process_time() - begin


def test_eight_times_the_readers_take_nothing_like_sixty_four_times_as_long():
    small, large = (np.min([seconds(count) for _ in range(3)], axis=0) for count in (2000, 16000))
    assert (large < 25 * np.maximum(small, 1e-3)).all(), (small, large)
