"""The rules of fold-bias: each looks at one node and folds there, refuses, or has nothing to do (False)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ...graph.broadcast import features, keeps_rank
from ...graph.builder import Builder
from ...graph.constant import Folded, fold
from ...graph.edit import (
    consumers,
    is_output,
    producer,
    remove_dead,
    replace_uses,
    set_inputs,
    substitute,
    take_over,
)
from ...graph.linear import Linear, read_linear
from ...graph.model import Model
from ...graph.types import FLOATS
from ..base import Refused
from .linear_bias import add_to_bias, bias_growth, freed_bytes, takes_bias
from .products import Weight
from .sharing import shows_inside

Array = npt.NDArray[Any]
LARGEST = 1e4  # constants above this (masks, rounding tricks) are left alone: reordering such a sum rounds
_LARGEST_HALF = {onnx.TensorProto.FLOAT16: 16.0, onnx.TensorProto.BFLOAT16: 2.0}  # there less rounds
_MOST = 1 << 22  # elements of a constant that is looked at


def drop_zero(model: Model, graph: gs.Graph, node: gs.Node) -> bool | Refused:
    """``x + 0 → x``, and biases of zeros out of Gemm, Conv and LayerNormalization."""
    if _is(node, "Add"):
        x, constant = _operands(node)
        if x is None or constant is None or not _all_zero(constant) or not _keeps_shape(x, constant):
            return False
        if constant.overridable:
            return False
        substitute(graph, node.outputs[0], x)
        remove_dead(graph, [node])
        return True
    optional = _is(node, "Conv") or (_is(node, "Gemm") and model.opset >= 11) or (
        _is(node, "LayerNormalization") and model.opset >= 17)
    if optional and len(node.inputs) == 3 and node.inputs[2].name:
        folded = fold(node.inputs[2])
        if folded is not None and not folded.overridable and _all_zero(folded):
            set_inputs(node, node.inputs[:2])
            return True
    return False


def merge_adds(model: Model, graph: gs.Graph, node: gs.Node) -> bool | Refused:
    """``(x + a) + b → x + (a + b)``; also where the first addition is the bias of a Gemm or Conv."""
    if not _is(node, "Add"):
        return False
    inner, b = _operands(node)
    if inner is None or b is None or is_output(graph, inner) or len(inner.outputs) != 1:
        return False
    first = producer(inner)
    if first is None or all(first is not other for other in graph.nodes):
        return False
    if not _is(first, "Add"):
        return False
    x, a = _operands(first)
    if x is None or a is None:
        return False
    reason = _unfit(a, b)
    if reason is not None:
        return Refused(reason, node.outputs[0].name) if reason else False
    total = a.load().astype(np.float64) + b.load().astype(np.float64)
    if not _no_larger(total.size, first, node, a, b):
        return Refused("a constant is shared, so that the file would grow", node.outputs[0].name)
    build = Builder(model, graph, node.name or first.name or "fold_bias", a.onnx_type)
    set_inputs(node, [x, build.constant(np.asarray(total), "folded_bias")])
    remove_dead(graph, [first])
    return True


def into_following_linear(model: Model, graph: gs.Graph, node: gs.Node) -> bool | Refused:
    """``(x + a) W + c → x W + (a W + c)``, where every reader of the sum is such a linear."""
    if not _is(node, "Add"):
        return False
    x, a = _operands(node)
    if x is None or a is None or is_output(graph, node.outputs[0]) or _part_of_norm(node, x):
        return False
    width = a.shape[-1] if a.shape else 1
    if any(dim != 1 for dim in a.shape[:-1]):
        return False
    linears = _linear_readers(graph, node.outputs[0])
    if linears is None or not all(takes_bias(linear, width) for linear in linears):
        return False
    reason = _unfit(a)
    if reason is not None:
        return Refused(reason, node.outputs[0].name) if reason else False
    if not keeps_rank(x, a.shape) or features(x) != linears[0].d_in:
        return Refused("the addition may give the value another shape", node.outputs[0].name)
    if bias_growth(linears) > freed_bytes(node, 0 if node.inputs[1] is x else 1):
        return Refused("a bias is shared, so that the file would grow", node.outputs[0].name)
    vector = np.broadcast_to(a.load().reshape(-1).astype(np.float64), (linears[0].d_in,))
    for linear in linears:
        add_to_bias(model, graph, linear, Weight.of(linear).after(vector))
    replace_uses(node.outputs[0], x)
    remove_dead(graph, [node])
    return True


def into_product(model: Model, graph: gs.Graph, node: gs.Node) -> bool | Refused:
    """Add behind a Gemm or Conv into its bias, behind a MatMul of a rank-2 value into a Gemm."""
    if not _is(node, "Add"):
        return False
    inner, b = _operands(node)
    first = producer(inner) if inner is not None else None
    if inner is None or b is None or first is None or is_output(graph, inner) or len(inner.outputs) != 1:
        return False
    if all(first is not other for other in graph.nodes) or b.overridable or b.onnx_type not in FLOATS:
        return False
    build = Builder(model, graph, first.name or "fold_bias", b.onnx_type)
    if _is(first, "MatMul"):
        if not _rank_two(first.inputs[0]) or model.opset < 7:
            return False
        weight = fold(first.inputs[1])
        if weight is None or len(weight.shape) != 2 or b.shape not in ((weight.shape[1],), (1, weight.shape[1])):
            return False
        if weight.quantized:
            return Refused("the matrix is quantized, and ONNX Runtime fuses that with a MatMul only", node.outputs[0].name)
        bias = node.inputs[1] if node.inputs[0] is inner else node.inputs[0]
        gemm = build.op("Gemm", first.inputs[0], first.inputs[1], bias, hint="gemm")
        take_over(node.outputs[0], gemm)
        remove_dead(graph, [node])
        return True
    if not (_is(first, "Gemm") or _is(first, "Conv")):
        return False
    total = _merged_bias(first, b)
    if total is None:
        return False
    set_inputs(first, [*first.inputs[:2], build.constant(total, "folded_bias")])
    take_over(node.outputs[0], inner)
    remove_dead(graph, [node])
    return True


def norm_shift(model: Model, graph: gs.Graph, node: gs.Node) -> bool | Refused:
    """The β of a LayerNormalization into the biases of the linears that read it, where all that read it are such."""
    if not _is(node, "LayerNormalization") or len(node.inputs) < 3 or not node.inputs[2].name or model.opset < 17:
        return False
    shift = fold(node.inputs[2])
    output = node.outputs[0]
    if shift is None or is_output(graph, output) or len(shift.shape) != 1:
        return False
    axis = int(node.attrs.get("axis", -1))
    rank = len(output.shape) if output.shape else None
    if axis != -1 and (rank is None or axis != rank - 1):
        return False
    linears = _linear_readers(graph, output)
    if linears is None:
        return Refused("another consumer than a linear reads the norm", output.name)
    if not all(takes_bias(linear, shift.shape[0]) for linear in linears):
        return Refused("a linear that reads the norm has no bias to take its shift", output.name)
    reason = _unfit(shift)
    if reason is not None:
        return Refused(reason, output.name) if reason else False
    if bias_growth(linears) > freed_bytes(node, 2):
        return Refused("a bias is shared, so that the file would grow", output.name)
    vector = np.broadcast_to(shift.load().astype(np.float64), (linears[0].d_in,))
    for linear in linears:
        add_to_bias(model, graph, linear, Weight.of(linear).after(vector))
    set_inputs(node, node.inputs[:2])
    return True


def _is(node: gs.Node, op: str) -> bool:
    return node.op == op and node.domain in (None, "", "ai.onnx")


def _operands(node: gs.Node) -> tuple[gs.Tensor | None, Folded | None]:
    """The computed operand and the constant one of an Add; (None, None) where it has not one of each."""
    left, right = fold(node.inputs[0]), fold(node.inputs[1])
    if (left is None) == (right is None):
        return None, None
    constant = left if left is not None else right
    if constant is None or int(np.prod(constant.shape, dtype=np.int64)) > _MOST:
        return None, None
    return (node.inputs[1] if left is not None else node.inputs[0]), constant


def _all_zero(constant: Folded) -> bool:
    return constant.onnx_type in FLOATS and not constant.load().any()


def _keeps_shape(x: gs.Tensor, constant: Folded) -> bool:
    """Whether ``x + constant`` surely has the shape of ``x``. A leading dimension that the graph states may be an exporter's."""
    if not constant.shape:
        return True
    if any(dim != 1 for dim in constant.shape[:-1]):
        return False
    shape = list(x.shape) if x.shape is not None else None
    if shape is None:
        node = producer(x)
        linear = read_linear(node) if node is not None else None
        if linear is None or linear.axis != -1 or len(constant.shape) != 1:
            return False
        return constant.shape[0] in (1, linear.d_out)
    if len(constant.shape) > len(shape):
        return False
    pairs = zip(shape[::-1], constant.shape[::-1], strict=False)
    return all(dim in (1, known) for known, dim in pairs)


def _unfit(*constants: Folded) -> str | None:
    """Why constants are not added up in another order; "" where that goes without saying."""
    for constant in constants:
        if constant.onnx_type not in FLOATS:
            return ""
        if constant.overridable:
            return "a constant is an input that the caller may override"
        top = np.abs(constant.load().astype(np.float64)).max(initial=0)
        if not top <= _LARGEST_HALF.get(constant.onnx_type, LARGEST):
            return "a constant is so large that another order of adding would round"
    return None


def _no_larger(size: int, first: gs.Node, second: gs.Node, a: Folded, b: Folded) -> bool:
    freed = 0
    for folded, node in ((a, first), (b, second)):
        if folded.sources and all(reader is node for reader in folded.sources[0].outputs):
            freed += int(np.prod(folded.shape, dtype=np.int64))
    return size <= max(freed, 1)


def _part_of_norm(node: gs.Node, x: gs.Tensor) -> bool:
    """Whether the Add is the last operator of a norm written out: ONNX Runtime would not recognize the norm without it."""
    scaled = producer(x)
    if scaled is None or scaled.op not in ("Mul", "LayerNormalization", "BatchNormalization", "InstanceNormalization"):
        return False
    return scaled.op != "Mul" or any(
        source is not None and source.op in ("Div", "Mul", "Cast", "LayerNormalization")
        for source in (producer(value) for value in scaled.inputs))


def _linear_readers(graph: gs.Graph, tensor: gs.Tensor) -> list[Linear] | None:
    """The linears that read ``tensor``, if nothing else does; a linear that gives out its product without its bias is none."""
    found = []
    for reader in consumers(tensor):
        linear = read_linear(reader)
        if linear is None or linear.input is not tensor or all(reader is not node for node in graph.nodes):
            return None
        if shows_inside(graph, linear):
            return None
        found.append(linear)
    return found or None


def _rank_two(x: gs.Tensor) -> bool:
    if x.shape is not None:
        return len(x.shape) == 2
    node = producer(x)
    if node is None:
        return False
    if node.op in ("Gemm", "Flatten"):
        return True
    if node.op == "Reshape" and len(node.inputs) > 1:
        shape = fold(node.inputs[1])
        return shape is not None and shape.shape == (2,)
    return False


def _merged_bias(node: gs.Node, b: Folded) -> Array | None:
    """The bias of a Gemm or Conv after ``b`` is added to its output; None where ``b`` is not one number a feature."""
    weight = fold(node.inputs[1])
    if weight is None or len(weight.shape) < 2 or _unfit(b) is not None:
        return None
    if node.op == "Gemm":
        width = weight.shape[0 if node.attrs.get("transB", 0) else 1]
        fits = b.shape in ((width,), (1, width), (), (1,), (1, 1))
    else:
        width = weight.shape[0]
        spatial = len(weight.shape) - 2
        fits = b.shape in ((width, *[1] * spatial), (1, width, *[1] * spatial))
    if not fits:
        return None
    vector = np.broadcast_to(b.load().reshape(-1).astype(np.float64), (width,))
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return vector
    old = fold(node.inputs[2])
    if old is None or _unfit(old) is not None or old.shape not in ((width,), (1, width), (), (1,), (1, 1)):
        return None
    factor = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    if node.op == "Gemm" and factor != 1.0:
        node.attrs["beta"] = 1.0
    return vector + factor * np.broadcast_to(old.load().reshape(-1).astype(np.float64), (width,))
