"""Taking a block out of the graph, with or without a constant in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.builder import Builder
from ...graph.constant import fold
from ...graph.edit import consumers, is_output, producer, remove_dead, set_inputs, substitute, take_over
from ...graph.model import Model
from ...graph.residual import SKIP_NORMS, Join, Sublayer
from ...graph.shapes import ALIASES

Array = npt.NDArray[Any]
_DEEPEST = 64


def measured_value(block: FFNBlock) -> gs.Tensor:
    """The value whose mean stands for the block: what the residual Add receives, or else the block's own output."""
    return block.join.branch if is_pure_branch(block) else block.output


def is_pure_branch(block: FFNBlock) -> bool:
    """Whether what the residual Add receives comes from this block and constants alone, and goes nowhere else."""
    join = block.join
    if all(join.node is not node for node in block.graph.nodes):
        return False
    pending, seen, inside = [join.branch], {id(join.branch)}, []
    reached = False
    while pending and len(seen) < _DEEPEST:
        tensor = pending.pop()
        if is_output(block.graph, tensor):
            return False
        if tensor is block.output:
            reached = True
            continue
        node = producer(tensor)
        if node is None:
            return False
        inside.append(node)
        alias = node.op in ALIASES
        for value in node.inputs[:1] if alias else node.inputs:
            if value.name and id(value) not in seen and fold(value) is None:
                seen.add(id(value))
                pending.append(value)
    allowed = {id(node) for node in (*inside, join.node)}
    values = [tensor for node in inside for tensor in node.outputs if tensor.name] + [block.output]
    return reached and not pending and all(id(reader) in allowed for value in values for reader in consumers(value))


def bypass(model: Model, block: FFNBlock, constant: Array | None) -> None:
    """Take ``block`` out.

    Args:
        constant: what to add in its place, ``[d]``, the mean of :func:`measured_value`; None for nothing.
    """
    if is_pure_branch(block) and splice(Builder(model, block.graph, block.name, stream_type(block)), block, constant):
        return
    build = Builder(model, block.graph, block.name, block.onnx_type)
    in_place = build.zeros(block.input, block.d_out, block.axis)
    if constant is not None:
        in_place = build.op("Add", in_place, build.vector(constant, block.axis, "mean"), hint="mean_output")
    block.replace(in_place)


def stream_type(block: Sublayer) -> int:
    """Element type of what the residual Add of ``block`` adds: the block's own, unless a Cast lies between."""
    tensor = block.join.branch
    for _ in range(_DEEPEST):
        node = producer(tensor)
        if node is None or tensor is block.output:
            break
        if node.op == "Cast":
            return int(node.attrs["to"])
        tensor = next((value for value in node.inputs if fold(value) is None), tensor)
    return block.onnx_type


def rescale(model: Model, block: FFNBlock, factor: float) -> None:
    """Take ``block``, a pure branch, out, and multiply the residual by ``factor`` in its place."""
    build = Builder(model, block.graph, block.name, stream_type(block))
    node, residual = block.join.node, block.join.residual
    if node.op == "Add":
        take_over(node.outputs[0], build.op("Mul", residual, build.number(factor, "scale"), hint="scaled"))
        remove_dead(block.graph, [node])
        return
    old = producer(block.join.branch)
    added = build.op("Mul", residual, build.number(factor - 1, "scale"), hint="scaled")
    set_inputs(node, [added if value is block.join.branch else value for value in node.inputs])
    remove_dead(block.graph, [old] if old is not None else [])


def splice(build: Builder, block: Sublayer, constant: Array | None) -> bool:
    """Take the branch out of the residual Add itself; False where that cannot be done, and nothing is changed."""
    node, residual, graph = block.join.node, block.join.residual, block.graph
    branch = producer(block.join.branch)
    if node.op in SKIP_NORMS:
        return _splice_skip_norm(build, block, constant)
    if constant is not None:
        vector = build.vector(constant, block.axis, "mean")
        set_inputs(node, [vector if value is block.join.branch else value for value in node.inputs])
        remove_dead(graph, [branch] if branch is not None else [])
        return True
    if node.op == "Sum" and len(node.inputs) > 2:
        set_inputs(node, [value for value in node.inputs if value is not block.join.branch])
        remove_dead(graph, [branch] if branch is not None else [])
        return True
    if producer(residual) is None and is_output(graph, node.outputs[0]) and isinstance(residual, gs.Constant):
        return False
    substitute(graph, node.outputs[0], residual)
    remove_dead(graph, [node])
    return True


def cut_out(build: Builder, block: Sublayer, constant: Array | None) -> None:
    """Take the branch out of the residual Add, or where that cannot do without it put zeros (or ``constant``) into it."""
    if splice(build, block, constant):
        return
    node, branch = block.join.node, block.join.branch
    old = producer(branch)
    scale = fold(node.inputs[2]) if node.op in SKIP_NORMS else None
    in_place = build.zeros(block.join.residual, scale.shape[-1] if scale is not None else 1, -1)
    if constant is not None:
        in_place = build.op("Add", in_place, build.vector(constant, -1, "mean"), hint="mean_output")
    set_inputs(node, [in_place if value is branch else value for value in node.inputs])
    remove_dead(block.graph, [old] if old is not None else [])


def drop_residual(build: Builder, block: Sublayer) -> None:
    """Take the residual out of the residual Add, so that the branch alone is left."""
    join = block.join
    node, kept = join.node, join.branch
    at = 3 if "Simplified" in node.op else 4  # the bias of a skip norm is the branch's
    if node.op in SKIP_NORMS and len(node.inputs) > at and node.inputs[at].name:
        kept = build.op("Add", kept, node.inputs[at], hint="bias_output")
        set_inputs(node, [kept if value is join.branch else value for value in node.inputs[:at]])
    other = Only(block.path, block.graph, block.output, Join(node, join.residual, kept, True, []), block.axis, block.onnx_type)
    cut_out(build, other, None)


@dataclass(frozen=True)
class Only:
    """A sublayer, said by what taking it out needs."""

    path: str
    graph: gs.Graph
    output: gs.Tensor
    join: Join
    axis: int
    onnx_type: int


def _splice_skip_norm(build: Builder, block: Sublayer, constant: Array | None) -> bool:
    """SkipLayerNormalization(residual, branch) → LayerNormalization(residual); the bias in it is the block's."""
    node, graph = block.join.node, block.graph
    simplified = "Simplified" in node.op
    if simplified and all(other.op != "SimplifiedLayerNormalization" for other in graph.nodes):
        return False  # onnx.checker does not know that operator; do not be the first to use it
    if any(output.name and (output.outputs or is_output(graph, output)) for output in node.outputs[1:3]):
        return False
    stream = block.join.residual
    shift = None if simplified or len(node.inputs) < 4 else node.inputs[3]
    if constant is not None:
        stream = build.op("Add", stream, build.vector(constant, -1, "mean"), hint="mean_output")
        bias = node.inputs[3 if simplified else 4:]
        if bias and bias[0].name:
            stream = build.op("Add", stream, bias[0], hint="bias_output")
    inputs = [stream, node.inputs[2]] + ([shift] if shift is not None and shift.name else [])
    normed = build.op("SimplifiedLayerNormalization" if simplified else "LayerNormalization", *inputs, axis=-1,
                      epsilon=float(node.attrs.get("epsilon", 1e-12)), stash_type=1, hint="norm")
    total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3].name else None
    take_over(node.outputs[0], normed)
    if total is not None:
        substitute(graph, total, stream)
    remove_dead(graph, [node])
    return True
