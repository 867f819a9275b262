"""The rule of fold-bias for attention: the bias of V goes through a softmax unchanged, as its rows sum to 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.broadcast import rank
from ...graph.constant import fold
from ...graph.edit import consumers, is_output, producer, remove_dead, replace_uses
from ...graph.linear import Linear, read_linear
from ...graph.model import Model
from ..base import Context, Refused
from .bias_rules import LARGEST
from .feature_axes import FEATURE, OTHER, Array, FeatureAxes, sizes, through
from .fusions import what_it_costs
from .linear_bias import add_to_bias, bias_growth, freed_bytes, takes_bias
from .same_value import same_value
from .sharing import shows_inside

_STEPS = 16
_WIDE = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@dataclass
class _Path:
    """The way of a bias from V to the output projection.

    Attributes:
        add: the addition of the bias; linear: V without it.
        out: the output projection.
        vector: what comes in there, ``[d_in]``.
        weights: the attention weights P, ``[*, queries, keys]``.
        keys: how many keys there are, where the graph says so.
    """

    add: gs.Node
    linear: Linear
    out: Linear
    vector: Array
    weights: gs.Tensor
    keys: int | None


def fold_value_bias(model: Model, graph: gs.Graph, node: gs.Node, context: Context) -> bool | Refused:
    """``softmax(S) (x W_v + b_v) W_o + b_o  →  softmax(S) (x W_v) W_o + (b_v W_o + b_o)``, for the Add of ``b_v``."""
    path = _find(graph, node)
    if path is None or isinstance(path, Refused):
        return path or False
    value = node.outputs[0].name
    reason = _reason_against(graph, path) or what_it_costs(
        model, [node.outputs[0]], lambda trial: _repeat(trial, value), context, new=["MatMul"], form=("value bias",))
    if reason is not None:
        return Refused(reason, value)
    _apply(model, graph, path)
    return True


def _repeat(trial: Model, value: str) -> bool:
    node = next((node for node in trial.graph.nodes if node.outputs and node.outputs[0].name == value), None)
    path = _find(trial.graph, node) if node is not None else None
    if isinstance(path, _Path):
        _apply(trial, trial.graph, path)
    return isinstance(path, _Path)


def _apply(model: Model, graph: gs.Graph, path: _Path) -> None:
    add_to_bias(model, graph, path.out, path.vector @ path.out.weight().astype(np.float64))
    product = path.linear.node.outputs[0]
    replace_uses(path.add.outputs[0], product, except_in=[path.add])
    path.add.outputs[0].replaced_by = product
    remove_dead(graph, [path.add])


def _find(graph: gs.Graph, add: gs.Node) -> _Path | Refused | None:
    """The path of the bias that ``add`` adds; None where it is none of an attention, or none that can be followed."""
    if add.op != "Add" or add.domain or not add.outputs:
        return None
    linear = next((found for found in (read_linear(source) for source in map(producer, add.inputs) if source is not None)
                   if found is not None and found.nodes[-1] is add), None)
    bias = next((folded for folded in map(fold, add.inputs) if folded is not None), None)
    if linear is None or bias is None or linear.kind != "MatMul" or bias.onnx_type not in _WIDE:
        return None
    if bias.overridable or shows_inside(graph, linear):
        return None
    value, tensor = FeatureAxes.last(bias.load().astype(np.float64)), add.outputs[0]
    weights: gs.Tensor | None = None
    keys: int | None = None
    cuts: list[gs.Node] = []
    for _ in range(_STEPS):
        node = _only_reader(graph, tensor)
        if node is None:
            return None
        if node.op == "MatMul" and not node.domain and weights is None and node.inputs[1] is tensor and (
                node.inputs[0] is not tensor):
            weights, keys = node.inputs[0], _keys(tensor)
            following = _weighted(value)
            reason = _rows_of_one(weights)
            if reason is not None:
                return Refused(reason, add.outputs[0].name) if reason else None
        elif weights is not None and (out := read_linear(node)) is not None:
            vector = value.vector
            fits = vector is not None and out.input is tensor and out.d_in == vector.size
            if vector is None or not fits or not _sure(linear, out, cuts, weights):
                return None
            return _Path(add, linear, out, vector, weights, keys)
        else:
            following = through(node, value) or _inferred(graph, node, value, linear)
            cuts += [node] if node.op == "Reshape" else []
        if following is None:
            return None
        value, tensor = following, node.outputs[0]
    return None


def _only_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The node that reads ``tensor``, if there is one only. Who reads its shape does not count."""
    if is_output(graph, tensor):
        return None
    readers = [node for node in consumers(tensor) if node.op != "Shape" or node.domain]
    found = readers[0] if len(readers) == 1 else None
    return found if found is not None and any(found is node for node in graph.nodes) else None


def _weighted(value: FeatureAxes) -> FeatureAxes | None:
    """Behind the product with weights whose rows sum to 1: the same, but for the keys, which must hold no features."""
    value = value.padded(2)
    if value.axes[-1] != FEATURE or value.axes[-2] == FEATURE:
        return None
    return FeatureAxes(value.numbers, tuple(axis if axis == FEATURE else OTHER for axis in value.axes))


def _keys(tensor: gs.Tensor) -> int | None:
    shape = tensor.shape
    return shape[-2] if shape and len(shape) > 1 and isinstance(shape[-2], int) else None


def _rows_of_one(weights: gs.Tensor) -> str | None:
    """Why the rows of ``weights`` may not sum to 1; "" where they are no attention weights at all."""
    node = producer(weights)
    while node is not None and node.op == "Identity":
        node = producer(node.inputs[0])
    if node is None:
        return ""
    if node.op == "Softmax" and not node.domain:
        axis, axes = node.attrs.get("axis"), rank(node.inputs[0])
        last = axis == -1 or (axes is not None and axis == axes - 1)
        return None if last else "the softmax is not, or not surely, over the keys"
    if _behind_softmax(node):
        return f"its attention weights may not sum to 1: {node.op} stands behind the softmax"
    return ""


def _behind_softmax(node: gs.Node, steps: int = 6) -> bool:
    if node.op == "Softmax":
        return True
    return steps > 0 and node.op in _BEHIND and any(
        source is not None and _behind_softmax(source, steps - 1) for source in map(producer, node.inputs))


_BEHIND = frozenset({"Dropout", "Mul", "Where", "Cast", "Identity", "Slice", "Div", "Reshape", "Add", "Clip", "Split"})


def _inferred(graph: gs.Graph, node: gs.Node, value: FeatureAxes, linear: Linear) -> FeatureAxes | None:
    """A Reshape with one dimension left to be inferred, which is the number of heads, or all features again.

    Cutting: ``[a, b, -1, size]``; what else must hold is checked by :func:`_sure` at the end of the path. Joining: the last
    dimension is what the linear behind it takes.
    """
    if node.op != "Reshape" or node.domain:
        return None
    asked = sizes(node)
    size = value.numbers.size
    if value.axes == (FEATURE,) and len(asked) == 4 and asked[2] == -1 and asked[3] and size % asked[3] == 0:
        return FeatureAxes(value.numbers.reshape(1, 1, -1, asked[3]), (OTHER, OTHER, FEATURE, FEATURE))
    first = value.axes.index(FEATURE)
    if asked and asked[-1] in (-1, None) and all(axis == FEATURE for axis in value.axes[first:]):
        reader = _only_reader(graph, node.outputs[0])
        behind = read_linear(reader) if reader is not None else None
        if behind is not None and behind.input is node.outputs[0] and behind.d_in == size:
            return FeatureAxes.last(value.numbers)
    return None


def _sure(linear: Linear, out: Linear, cuts: list[gs.Node], weights: gs.Tensor) -> bool:
    """Whether heads whose number was inferred are surely those of the features.

    Q is cut from the same x and width in the same way as V, so that Q, V and their weighted sum have one shape
    ``[a, b, n, size]``, but for the order; its last Reshape gives ``[a, b, d_in]``, so ``n · size = d_in``, which is V's width.
    """
    inferred = [node for node in cuts if len(asked := sizes(node)) == 4 and asked[2] == -1]
    if not inferred:
        return True
    query = _query(weights)
    if len(inferred) != 1 or query is None or query.input is not linear.input or query.d_out != linear.d_out:
        return False
    [cut] = inferred
    same_cut = any(node.op == "Reshape" and same_value(node.inputs[1], cut.inputs[1]) for node in consumers(query.output))
    first, last = _parts(cut), _parts(cuts[-1])
    return same_cut and linear.d_out == out.d_in and len(last) == 3 and all(
        same_value(one, other) for one, other in zip(first[:2], last[:2], strict=True))


def _parts(node: gs.Node) -> list[gs.Tensor]:
    joined = producer(node.inputs[1])
    return list(joined.inputs) if joined is not None and joined.op == "Concat" else []


def _query(weights: gs.Tensor) -> Linear | None:
    """The linear that Q comes from, found through scaling, turning and reshaping alone."""
    node = producer(weights)
    for _ in range(_STEPS):  # back to the product of Q and K
        if node is None:
            return None
        if node.op == "MatMul":
            break
        computed = [tensor for tensor in node.inputs if tensor.name and fold(tensor) is None]
        products = [tensor for tensor in computed if _has_product(tensor)]
        node = producer(products[0]) if len(products) == 1 else None
    tensor = node.inputs[0] if node is not None else None
    for _ in range(_STEPS):
        node = producer(tensor) if tensor is not None else None
        if node is None:
            return None
        linear = _ends_here(node)
        if linear is not None:
            return linear
        if node.op not in ("Mul", "Div", "Transpose", "Reshape", "Identity"):
            return None
        computed = [each for each in node.inputs[:1 if node.op == "Reshape" else 2] if fold(each) is None]
        tensor = computed[0] if len(computed) == 1 else None
    return None


def _ends_here(node: gs.Node) -> Linear | None:
    linear = read_linear(node)
    if linear is None and node.op == "Add":
        found = (read_linear(source) for source in map(producer, node.inputs) if source is not None)
        linear = next((each for each in found if each is not None and each.nodes[-1] is node), None)
    return linear


def _has_product(tensor: gs.Tensor, steps: int = 6) -> bool:
    node = producer(tensor)
    if node is None or steps == 0:
        return False
    if node.op == "MatMul":
        return True
    return node.op in ("Add", "Mul", "Div", "Sub", "Where", "Softmax", "Identity") and any(
        _has_product(each, steps - 1) for each in node.inputs)


def _reason_against(graph: gs.Graph, path: _Path) -> str | None:
    bias = next(folded for folded in map(fold, path.add.inputs) if folded is not None)
    if not np.abs(bias.load().astype(np.float64)).max(initial=0) <= LARGEST:
        return "a constant is so large that another order of adding would round"
    if path.out.bias is None or not takes_bias(path.out, path.out.d_in) or shows_inside(graph, path.out):
        return "the output projection of the attention has no bias to take that of V"
    if path.out.onnx_type not in _WIDE:
        return "weights of 16 bits would be rounded anew"
    query = _query(path.weights)
    if not path.keys and (query is None or query.input is not path.linear.input):
        return "it cannot be told that there is a key to every query: without one the attention is 0, whatever the bias"
    index = next(index for index, tensor in enumerate(path.add.inputs) if fold(tensor) is not None)
    if bias_growth([path.out]) > freed_bytes(path.add, index):
        return "a bias is shared, so that the file would grow"
    return None
