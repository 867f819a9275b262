"""What mixes tokens in attention, written out by an exporter: found from its Softmax.

    Q [B, S, N·H] ──► Reshape [B, S, N, H] ──► Transpose ──► [scale] ──┐
    K [B, T, N·H] ──► Reshape [B, T, N, H] ──► Transpose ──► [scale] ──┴► MatMul ──► [scale] ──► [+ mask] ──► Softmax ──┐
    V [B, T, N·G] ──► Reshape [B, T, N, G] ──► Transpose ──────────────────────────────────────────────────────────────┴► MatMul
      ──► Transpose ──► Reshape [B, S, N·G]
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from .constant import fold, integers, scalar
from .edit import consumers, is_output, producer
from .rejection import Refusal

_STEPS = 8
_PRODUCTS = ("MatMul", "FusedMatMul")
_HEADS_FIRST = (0, 2, 1, 3)
_TURNED = (0, 2, 3, 1)


@dataclass(frozen=True)
class AttentionCore:
    """softmax(scale · Q Kᵀ + mask) V.

    Attributes:
        q, k, v: ``[batch, tokens, heads · d]``, before they are divided into heads.
        reshapes: the nodes that divide them.
        mask: what is added to the products; None where nothing is.
        scale: by what the products are multiplied.
        softmax: the node. output: ``[batch, tokens, heads · d]`` of all heads.
        last: the node that gives it.
    """

    q: gs.Tensor
    k: gs.Tensor
    v: gs.Tensor
    reshapes: tuple[gs.Node, gs.Node, gs.Node]
    mask: gs.Tensor | None
    scale: float
    softmax: gs.Node
    output: gs.Tensor
    last: gs.Node


def read_attention_core(graph: gs.Graph, softmax: gs.Node) -> AttentionCore | Refusal | None:
    """The core around ``softmax``; what is unlike it, or None where its result is not multiplied by a value (a classifier)."""
    mixing = _only_reader(graph, softmax.outputs[0])
    if not isinstance(mixing, gs.Node):
        several = [node for node in consumers(softmax.outputs[0]) if node.op in _PRODUCTS]
        return Refusal(softmax.outputs[0].name, "its probabilities are read elsewhere as well") if several else None
    if mixing.op not in _PRODUCTS or mixing.inputs[0] is not softmax.outputs[0] or producer(mixing.inputs[1]) is None:
        return None
    if int(softmax.attrs.get("axis", -1)) not in (-1, 3) or _is_turned(mixing) or mixing.attrs.get("alpha", 1.0) != 1.0:
        return Refusal(softmax.outputs[0].name, "it is not over the last of four axes")
    scores = _scores(graph, softmax.inputs[0])
    if isinstance(scores, Refusal):
        return scores
    product, mask, scale = scores
    wanted = _HEADS_FIRST if _is_turned(product) else _TURNED
    sides = [_divided(tensor, perm) for tensor, perm in
             ((product.inputs[0], _HEADS_FIRST), (product.inputs[1], wanted), (mixing.inputs[1], _HEADS_FIRST))]
    for side in sides:
        if isinstance(side, Refusal):
            return side
    (one, of_q), (two, of_k), (three, of_v) = (side for side in sides if not isinstance(side, Refusal))
    ending = _joined(graph, mixing.outputs[0])
    if isinstance(ending, Refusal):
        return ending
    if of_v != 1.0:
        return Refusal(mixing.inputs[1].name, "its values are scaled")
    return AttentionCore(one.inputs[0], two.inputs[0], three.inputs[0], (one, two, three), mask, scale * of_q * of_k, softmax,
                         ending.outputs[0], ending)


def _only_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    readers = consumers(tensor)
    return readers[0] if len(readers) == 1 and not is_output(graph, tensor) else None


def _is_turned(node: gs.Node) -> bool:
    return any(node.attrs.get(each, 0) for each in ("transA", "transB", "transBatchA", "transBatchB"))


def _scores(graph: gs.Graph, tensor: gs.Tensor) -> tuple[gs.Node, gs.Tensor | None, float] | Refusal:
    """The product Q Kᵀ in front of a Softmax, what is added to it, and by what it is multiplied."""
    mask: gs.Tensor | None = None
    scale = 1.0
    for _ in range(_STEPS):
        node = producer(tensor)
        if node is None or _only_reader(graph, tensor) is None:
            return Refusal(tensor.name, "its products are read elsewhere as well")
        factor = _factor(node)
        if node.op == "Add" and mask is None and scale == 1.0:
            index = next((i for i in (0, 1) if _leads_to_product(node.inputs[i])), None)
            if index is None:
                break
            tensor, mask = node.inputs[index], node.inputs[1 - index]
        elif factor is not None:
            tensor, scale = factor[0], scale * factor[1]
        elif node.op in _PRODUCTS:
            if any(node.attrs.get(each, 0) for each in ("transA", "transBatchA", "transBatchB")):
                break
            return node, mask, scale * float(node.attrs.get("alpha", 1.0))
        else:
            break
    return Refusal(tensor.name, "what is in front of the Softmax is no product, scaled, and a mask")


def _leads_to_product(tensor: gs.Tensor) -> bool:
    for _ in range(_STEPS):
        node = producer(tensor)
        if node is None:
            return False
        if node.op in _PRODUCTS:
            return True
        factor = _factor(node)
        if factor is None:
            return False
        tensor = factor[0]
    return False


def _factor(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """What a product with a number multiplies, and the number."""
    if node.op not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    number = _number(node.inputs[1])
    if number is not None and number != 0:
        return node.inputs[0], number if node.op == "Mul" else 1 / number
    number = _number(node.inputs[0]) if node.op == "Mul" else None
    return (node.inputs[1], number) if number is not None else None


def _number(tensor: gs.Tensor) -> float | None:
    """The number that a value always is, if it broadcasts against four axes."""
    folded = fold(tensor)
    return None if folded is None or folded.overridable or len(folded.shape) > 4 else scalar(tensor)


def _divided(tensor: gs.Tensor, wanted: tuple[int, ...]) -> tuple[gs.Node, float] | Refusal:
    """The Reshape that divides a value into heads, from what becomes of it by Transposes ``wanted`` in all; and a factor."""
    start, scale = tensor, 1.0
    perm: tuple[int, ...] = (0, 1, 2, 3)
    for _ in range(_STEPS):
        node = producer(tensor)
        factor = None if node is None else _factor(node)
        if factor is not None:
            tensor, scale = factor[0], scale * factor[1]
        elif node is not None and node.op == "Transpose" and len(node.attrs.get("perm", ())) == 4:
            perm = tuple(int(node.attrs["perm"][axis]) for axis in perm)
            tensor = node.inputs[0]
        elif node is not None and node.op == "Reshape" and perm == wanted and known_heads(node) is not None:
            return node, scale
        else:
            break
    return Refusal(start.name, "it is no value [batch, tokens, heads · d] divided into heads (rotary positions, repeated heads)")


def known_heads(reshape: gs.Node) -> tuple[int, int] | None:
    """How many heads, and how wide, a Reshape to ``[batch, tokens, heads, d]`` says; −1 for one of them that follows."""
    target = reshape.inputs[1]
    known = integers(target)
    if known is None:
        joined = producer(target)
        if joined is None or joined.op != "Concat":
            return None
        known = []
        for part in reversed(joined.inputs):
            numbers = integers(part)
            if numbers is None:
                break
            known = numbers + known
        if len(known) > 4:
            return None
    elif len(known) != 4:
        return None
    if len(known) < 2:
        return None
    heads, width = known[-2:]
    return (heads, width) if heads > 0 or width > 0 else None


def _joined(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | Refusal:
    """The Reshape that puts the heads beside each other."""
    turn = _only_reader(graph, tensor)
    if turn is None or turn.op != "Transpose" or tuple(turn.attrs.get("perm", ())) != _HEADS_FIRST:
        return Refusal(tensor.name, "its heads are not put beside each other by a Transpose and a Reshape")
    ending = _only_reader(graph, turn.outputs[0]) or next(
        (node for node in consumers(turn.outputs[0]) if node.op == "Reshape"), None)
    if ending is None or ending.op != "Reshape":
        return Refusal(turn.outputs[0].name, "its heads are not put beside each other by a Transpose and a Reshape")
    others = [node for node in consumers(turn.outputs[0]) if node is not ending and node.op != "Shape"]
    if others or is_output(graph, turn.outputs[0]):
        return Refusal(turn.outputs[0].name, "its heads are read elsewhere as well")
    return ending
