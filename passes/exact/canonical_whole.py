"""A whole block without the Reshapes that flatten its rows for Gemm and unflatten them again."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.builder import Builder
from ...graph.constant import fold
from ...graph.edit import consumers, is_output, producer
from ...graph.linear import Linear
from ..base import Context
from .canonical_linear import bias_tensor
from .canonical_region import Core, chain, cut_of, own_core, split
from .canonical_weights import CanonicalWeights
from .leading_dimensions import reshapes_to

_SHAPE_MATHS = frozenset({"Shape", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Identity", "Add", "Sub",
                          "Mul", "Div"})
_ALLOWED = frozenset({"Reshape", "Identity", "MatMul", "Gemm"})


def can_be_whole(block: FFNBlock, core: Core) -> bool:
    """Whether ``block`` flattens rows, and is sure to give them back as it got them."""
    if block.axis != -1 or all(node.op != "Reshape" for node in block.nodes):
        return False
    if any(linear.kind not in ("MatMul", "Gemm") or linear.packed or linear.gathered or linear.axis != -1
           or linear.node.attrs.get("transA", 0) for linear in block.linears()):
        return False
    inside = {id(node) for node in core.nodes} | {id(node) for linear in block.linears() for node in linear.nodes}
    cut = cut_of(block)
    if any(leaf.columns is not None for leaf in block.region.leaves):
        if cut is None or cut.halves is None:
            return False
        inside |= {id(node) for node in block.region.nodes}
    rest = [node for node in block.nodes if id(node) not in inside]
    if any(node.op not in _ALLOWED and not (node.op == "Add" and node is producer(block.output)) for node in rest):
        return False
    if not _keeps_rows(core):
        return False
    last = _last_reshape(block)
    return last is not None and reshapes_to(last, block.input) and _read_inside_only(block)


def _keeps_rows(core: Core) -> bool:
    """Whether the core's own nodes would do the same to values with other leading dimensions."""
    for node in core.nodes:
        for tensor in node.inputs:
            folded = fold(tensor) if tensor.name else None
            if folded is not None and any(dim != 1 for dim in folded.shape[:-1]):
                return False
        if node.op in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"):
            return False
    return True


def _last_reshape(block: FFNBlock) -> gs.Node | None:
    """The Reshape nearest to the output."""
    inside = {id(node) for node in block.nodes}
    tensor = block.output
    for _ in range(len(block.nodes) + 1):
        node = producer(tensor)
        if node is None or id(node) not in inside:
            return None
        if node.op == "Reshape":
            return node
        following = [value for value in node.inputs if value.inputs and id(value.inputs[0]) in inside]
        if not following:
            return None
        tensor = following[0]
    return None


def _read_inside_only(block: FFNBlock) -> bool:
    """Whether nothing but the block, and the arithmetic on shapes that serves it, reads the values inside it."""
    inside = {id(node) for node in block.nodes}
    pending = [tensor for node in block.nodes for tensor in node.outputs if tensor is not block.output and tensor.name]
    seen: set[int] = set()
    while pending:
        tensor = pending.pop()
        if is_output(block.graph, tensor):
            return False
        for reader in consumers(tensor):
            if id(reader) in inside or id(reader) in seen:
                continue
            if reader.op not in _SHAPE_MATHS:
                return False
            seen.add(id(reader))
            pending += [out for out in reader.outputs if out.name]
    return True


def emit_whole(build: Builder, block: FFNBlock, core: Core, weights: CanonicalWeights, context: Context) -> gs.Tensor | None:
    """``down(act(up x))`` from the block's input, with its leading dimensions; not connected yet. None where a weight cannot
    be read as a MatMul does."""
    read: dict[int, gs.Tensor] = {}
    for linear in block.linears():
        weight = weights.matrix(build, linear)
        if weight is None:
            return None
        read[id(linear)] = weight
    made: dict[int, gs.Tensor] = {}
    starts: list[gs.Tensor] = []
    for leaf in block.region.leaves:
        if id(leaf.linear) not in made:
            made[id(leaf.linear)] = _product(build, leaf.linear, block.input, read)
        starts.append(made[id(leaf.linear)])
    cut = cut_of(block)
    if cut is not None and cut.halves is not None:
        starts = split(build, starts[0], -1, cut.halves)
    h = chain(build, block, starts, context)
    if h is None:
        h = own_core(build, core, starts)
    y = _product(build, block.down.linear, h, read)
    for extra in block.down.extra_bias:
        y = build.op("Add", y, build.constant(extra().reshape(-1), "down_bias"), hint="down_add")
    return y


def _product(build: Builder, linear: Linear, x: gs.Tensor, read: dict[int, gs.Tensor]) -> gs.Tensor:
    hint = linear.node.name.rsplit("/", 1)[-1] or linear.kind
    y = build.op("MatMul", x, read[id(linear)], hint=hint)
    bias = bias_tensor(build, linear)
    return y if bias is None else build.op("Add", y, bias, hint=f"{hint}_add")
