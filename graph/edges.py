"""Where a block begins and ends: its input and output, so that one value can be put in the place of the other's.

A linear may stand between two Reshapes (rows flattened to 2-D and back). Input and output are taken on the same side of
them, so that both have the same leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from .constant import fold
from .edit import consumers, producer
from .linear import Linear
from .picked import picked
from .pointwise import Array
from .region import Region
from .shapes import last_dimension

_RANK_CHANGES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_SILENT_AT_MOST = 24
_SILENT = frozenset({"Identity", "Dropout", "QuantizeLinear", "DequantizeLinear", "Reshape"})
_SILENT_FOR_EXPERTS = _SILENT | {"Squeeze", "Unsqueeze"}


@dataclass(eq=False)
class Edges:
    """Input and output of a block, the nodes from one to the other, and biases found behind the down projection."""

    input: gs.Tensor
    output: gs.Tensor
    nodes: list[gs.Node]
    extra_bias: list[Callable[[], Array]] = field(default_factory=list)


def block_edges(region: Region, down: Linear) -> Edges | str:
    """The edges of the block that ends in ``down``, or a sentence saying why it has none."""
    ups = list({id(leaf.linear): leaf.linear for leaf in region.leaves}.values())
    inputs = {id(linear.input): linear.input for linear in ups}
    inside = [node for linear in ups for node in linear.nodes] + region.nodes + down.nodes
    output, trailing, biases = _behind(down)
    inside += trailing
    turns = _turns(region.leaves[0].linear.output, output, inside)
    direct = next(iter(inputs.values()))
    before = [(_before_reshape(tensor)) for tensor in inputs.values()]
    if len(inputs) == 1 and turns % 2 == 0:
        after = _after_reshape(output, down.d_out)
        if before[0] is not None and after is not None and _same_rank(before[0].inputs[0], after.outputs[0]):
            return Edges(before[0].inputs[0], after.outputs[0], [before[0], *inside, after], biases)
        return Edges(direct, output, inside, biases)
    if all(node is not None for node in before):
        sources = {id(node.inputs[0]): node.inputs[0] for node in before if node is not None}
        if len(sources) == 1:
            source = next(iter(sources.values()))
            reshapes = [node for node in before if node is not None]
            if turns % 2 == 1:
                return Edges(source, output, [*reshapes, *inside], biases)
            after = _after_reshape(output, down.d_out)
            if after is not None:
                return Edges(source, after.outputs[0], [*reshapes, *inside, after], biases)
            return Edges(direct, output, inside, biases)
    after = _after_reshape(output, down.d_out)
    if len(inputs) == 1 and after is not None:
        return Edges(direct, after.outputs[0], [*inside, after], biases)
    return Edges(direct, output, inside, biases)


def _behind(down: Linear) -> tuple[gs.Tensor, list[gs.Node], list[Callable[[], Array]]]:
    """The output with a bias that is added behind silent operators, the nodes up to it, and that bias."""
    tensor = down.output
    passed: list[gs.Node] = []
    if down.bias is not None:
        return down.output, [], []
    for _ in range(_SILENT_AT_MOST):
        readers = consumers(tensor)
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op == "Add" and (passed or down.experts != 1):
            other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
            folded = (fold(other) or (picked(other) if down.gathered else None)) if other is not tensor else None
            if folded is None or folded.shape[-1:] != (down.d_out,) or folded.size != down.d_out:
                break
            return node.outputs[0], [*passed, node], [folded.load]
        silent = node.op in (_SILENT if down.experts == 1 else _SILENT_FOR_EXPERTS) or (
            node.op == "Cast" and node.attrs.get("to") == down.onnx_type)
        if not silent or node.inputs[0] is not tensor:
            break
        passed.append(node)
        tensor = node.outputs[0]
    return down.output, [], []


def _turns(start: gs.Tensor, end: gs.Tensor, inside: list[gs.Node]) -> int:
    """How many operators between ``start`` and ``end`` change the number of dimensions."""
    within = {id(node) for node in inside}
    count, tensor = 0, end
    for _ in range(len(inside) + 1):
        node = producer(tensor)
        if tensor is start or node is None or id(node) not in within:
            break
        count += node.op in _RANK_CHANGES
        tensor = next((value for value in node.inputs if value is start), None) or next(
            (value for value in node.inputs if value.inputs and id(value.inputs[0]) in within), node.inputs[0])
    return count


def _before_reshape(tensor: gs.Tensor) -> gs.Node | None:
    node = producer(tensor)
    return node if node is not None and node.op in ("Reshape", "Flatten") else None


def _after_reshape(tensor: gs.Tensor, width: int) -> gs.Node | None:
    readers = consumers(tensor)
    if len(readers) != 1 or readers[0].op != "Reshape" or readers[0].inputs[0] is not tensor:
        return None
    return readers[0] if last_dimension(readers[0]) in (0, -1, width) else None


def _same_rank(a: gs.Tensor, b: gs.Tensor) -> bool:
    return a.shape is None or b.shape is None or len(a.shape) == len(b.shape)
