"""Order, names, Identities, casts to the same type and copied constants change nothing of what is found."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

D, FF = 8, 32


def _fused_gate_up() -> Sketch:
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    both = s.op("MatMul", s.norm(x, D), s.weight(s.numbers(D, 2 * FF)))
    s.op("Split", both, s.weight(np.asarray([FF, FF])), out=["gate", "up"], axis=-1)
    s.op("Add", x, s.linear(s.op("Mul", s.activation("silu", "gate"), "up"), FF, D), out=s.output("y"))
    return s


def _no_block() -> Sketch:
    """An LM head's transform: nothing joins a residual stream."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("MatMul", s.norm(s.activation("gelu", s.linear(x, D, FF)), FF), s.weight(s.numbers(FF, 100)), out=s.output("y"))
    return s


SKETCHES = {"gelu": lambda: transformer(2, activation="gelu"), "gelu_tanh": lambda: transformer(1, activation="gelu_tanh"),
            "gated": lambda: transformer(2, activation="silu", gated=True, bias=False), "fused gate-up": _fused_gate_up,
            "post-norm": lambda: transformer(2, activation="relu", pre_norm=False), "none": _no_block}


@cache
def original(name: str) -> onnx.ModelProto:
    return SKETCHES[name]().model()


def found(model: onnx.ModelProto, folder: Path) -> list[tuple[Any, ...]]:
    """What is known of each block, but its names."""
    path = folder / "model.onnx"
    onnx.save_model(model, path)
    return [(block.index, block.d_model, block.d_ff, block.d_out, block.activation.name, block.gated, block.up.has_bias,
             block.down_bias, block.parallel, block.experts, block.parameters) for block in find_ffn_blocks(Model.load(path))]


def shuffle(model: onnx.ModelProto, chance: random.Random) -> None:
    """The nodes in any order."""
    nodes = list(model.graph.node)
    chance.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def rename(model: onnx.ModelProto, chance: random.Random) -> None:
    """Another name for every value and node."""
    new: dict[str, str] = {"": ""}

    def named(name: str) -> str:
        return new.setdefault(name, f"v{chance.getrandbits(64):x}")

    for node in model.graph.node:
        node.name = f"n{chance.getrandbits(64):x}"
        node.input[:] = [named(name) for name in node.input]
        node.output[:] = [named(name) for name in node.output]
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        info.name = named(info.name)


def pass_through(model: onnx.ModelProto, chance: random.Random) -> None:
    """An Identity, or a Cast to the type that it has, in front of some inputs."""
    ends = {name: TensorProto.INT64 for node in model.graph.node if node.op_type == "Constant" for name in node.output
            if node.attribute[0].t.data_type == TensorProto.INT64}
    for node in model.graph.node:
        if node.op_type in ("Identity", "Cast") and node.output[0].startswith("between_"):
            ends[node.output[0]] = ends.get(node.input[0], TensorProto.FLOAT)
    ends |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        for index, name in enumerate(node.input):
            if not name or chance.random() > 0.2:
                continue
            between = f"between_{len(model.graph.node)}"
            kind = ends[between] = ends.get(name, TensorProto.FLOAT)
            op = helper.make_node("Cast", [name], [between], to=kind) if chance.random() < 0.5 else helper.make_node(
                "Identity", [name], [between])
            model.graph.node.insert(0, op)
            node.input[index] = between


def split_constants(model: onnx.ModelProto, chance: random.Random) -> None:
    """Each reader of an initializer gets one of its own, some as Constant nodes."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        for index, name in enumerate(node.input):
            if name not in stored or chance.random() > 0.5:
                continue
            copy = numpy_helper.from_array(numpy_helper.to_array(stored[name]), f"{name}_copy_{len(model.graph.node)}_{index}")
            if chance.random() < 0.5:
                model.graph.node.insert(0, helper.make_node("Constant", [], [copy.name], value=copy))
            else:
                model.graph.initializer.append(copy)
            node.input[index] = copy.name


MUTATIONS = {"shuffle": shuffle, "rename": rename, "pass through": pass_through, "split constants": split_constants}


@pytest.mark.parametrize("name", SKETCHES)
@given(steps=st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=1, max_size=4), seed=st.integers(0, 2 ** 32))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_found_does_not_change(tmp_path: Path, name: str, steps: list[str], seed: int) -> None:
    chance = random.Random(seed)
    model = onnx.ModelProto()
    model.CopyFrom(original(name))
    expected = found(model, tmp_path)
    for step in steps:
        MUTATIONS[step](model, chance)
    # a shuffled file lists blocks in order of execution all the same
    assert found(model, tmp_path) == expected


@pytest.mark.parametrize(("name", "count"), [("gelu", 2), ("gelu_tanh", 1), ("gated", 2), ("fused gate-up", 1), ("post-norm", 2),
                                             ("none", 0)])
def test_the_sketches_hold_what_they_should(tmp_path, name, count):
    assert len(found(original(name), tmp_path)) == count
