"""fold-norm: the scale and shift of a norm, folded into the linears that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.constant import Folded, fold
from ..graph.edit import consumers, is_output, producer, remove_dead, replace_uses, set_input, set_inputs
from ..graph.linear import Linear, read_linear
from ..graph.model import Model
from ..graph.norm import Norm, Slot, read_norm
from ..graph.shapes import last_dimension
from ..graph.types import numpy_type
from ..graph.weights import InlineValues
from .base import Context, Pass, PassResult, Refused
from .exact.linear_bias import add_to_bias, is_fixed
from .exact.norm_fusion import is_fused
from .exact.products import Weight
from .exact.scaled import scaled_weight
from .exact.sharing import is_free, is_shared, shows_inside

Array = npt.NDArray[Any]
_LARGEST, _SMALLEST = 1e4, 1e-20
_WIDE = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold the scale γ and the shift β of a LayerNorm or RMSNorm into every linear that reads it.

        (x̂ ∘ γ + β) W + b   =   x̂ (diag(γ) W) + (β W + b)              FlashNorm, arXiv 2407.09577

    A norm that is one operator, or that ONNX Runtime makes one operator of, keeps its form: γ becomes ones (one initializer
    for all norms of that width), β goes. One that ONNX Runtime leaves in pieces loses the multiplication and the
    addition. Which is the case is found by asking ONNX Runtime about each form of norm that the model has. The products are
    taken in float64.

    Does not fire where anything but a linear reads the norm's output, where a weight is shared, quantized, an input that the
    caller may override, or float16 or bfloat16 (rounding γ W to so few bits is no rounding error); where β is not zero and a
    linear has no bias to take it; where γ is so large that the weights may overflow, or so small that they may vanish.
    """

    name: ClassVar[str] = "fold-norm"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Fold every norm once."""
        fired = 0
        refused = []
        for path, graph in model.graphs():
            for node in list(graph.nodes):
                norm = read_norm(node) if node.outputs else None
                if norm is None or _is_inner_part(norm) or _is_folded(norm):
                    continue
                outcome = _fold(model, path, graph, norm, context)
                if isinstance(outcome, Refused):
                    refused.append(outcome)
                else:
                    fired += 1
        return self.result(fired, refused)


def _is_inner_part(norm: Norm) -> bool:
    """Whether this is the product with γ of a norm whose last node is the addition of β."""
    readers = consumers(norm.output)
    if len(readers) != 1 or norm.shift is not None:
        return False
    longer = read_norm(readers[0]) if readers[0].op == "Add" else None
    return longer is not None and longer.bare is norm.bare and longer.bare is not None


def _is_folded(norm: Norm) -> bool:
    if not (norm.scale.load() == 1).all():
        return False
    return norm.shift is None or not norm.shift.load().any()


def _fold(model: Model, path: str, graph: gs.Graph, norm: Norm, context: Context) -> Refused | None:
    name = norm.output.name
    if is_output(graph, norm.output):
        return Refused("the norm is an output of the graph", name)
    linears = _readers(graph, norm.output)
    if linears is None:
        return Refused("another consumer than a linear reads the norm", name)
    reason = _reason_against(norm, linears) or _growth(graph, norm, linears, context)
    if reason is not None:
        return Refused(reason, name)
    scale = np.broadcast_to(norm.scale.load().reshape(-1).astype(np.float64), (norm.width,))
    shift = None if norm.shift is None else norm.shift.load().reshape(-1).astype(np.float64)
    for linear in linears:
        if shift is not None and shift.any():
            add_to_bias(model, graph, linear, Weight.of(linear).after(shift))
        if (scale != 1).any():
            _scale_input(model, graph, linear, scale)
    if norm.bare is not None and path == "main" and not is_fused(model, norm, context):
        replace_uses(norm.output, norm.bare)
        norm.output.replaced_by = norm.bare
        remove_dead(graph, [norm.nodes[-1]])
    else:
        _neutralize(model, graph, norm, context)
    return None


def _readers(graph: gs.Graph, tensor: gs.Tensor, depth: int = 4) -> list[Linear] | None:
    """The linears that read ``tensor``, also behind reshapes that keep the features, if nothing else does."""
    found: list[Linear] = []
    for reader in consumers(tensor):
        if all(reader is not node for node in graph.nodes):
            return None
        linear = read_linear(reader)
        if linear is not None and linear.input is tensor:
            if shows_inside(graph, linear):
                return None
            found.append(linear)
            continue
        if depth == 0 or reader.op not in ("Reshape", "Identity") or is_output(graph, reader.outputs[0]):
            return None
        behind = _readers(graph, reader.outputs[0], depth - 1)
        if behind is None or (reader.op == "Reshape" and last_dimension(reader) not in (0, behind[0].d_in)):
            return None
        found += behind
    return found or None


def _reason_against(norm: Norm, linears: list[Linear]) -> str | None:
    shifted = norm.shift is not None and bool(norm.shift.load().any())
    for linear in linears:
        if linear.kind not in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm") or linear.axis != -1 or linear.packed:
            return "a linear that reads the norm is of a form that is not folded into"
        if linear.d_in != norm.width or linear.gathered:
            return "a linear that reads the norm is of another width"
        if linear.quantized:
            return "a linear that reads the norm is quantized"
        if linear.overridable or norm.scale.overridable or (norm.shift is not None and norm.shift.overridable):
            return "a weight is an input that the caller may override"
        if shifted and not is_fixed(linear):
            return "a bias is an input that the caller may override"
        if linear.onnx_type not in _WIDE or norm.scale.onnx_type not in _WIDE:
            return "weights of 16 bits would be rounded anew"
        if is_shared(linear):
            return "a weight is shared with something else"
        if shifted and linear.bias is None and linear.kind not in ("Gemm", "FusedGemm"):
            return "a linear that reads the norm has no bias to take its shift"
    for constant in (norm.scale, *([norm.shift] if norm.shift is not None else [])):
        if not np.abs(constant.load().astype(np.float64)).max(initial=0) <= _LARGEST:
            return "the scale or the shift is so large that the weights may overflow"
    scale = np.abs(norm.scale.load().astype(np.float64))
    if np.any((scale > 0) & (scale < _SMALLEST)):
        return "the scale is so small that the weights may vanish"
    return None


def _growth(graph: gs.Graph, norm: Norm, linears: list[Linear], context: Context) -> str | None:
    """Why not, where the file would grow: a new bias, or a bias, γ or β that something else goes on reading."""
    more = 0
    for at, constant, number in ((norm.scale_at, norm.scale, 1), (norm.shift_at, norm.shift, 0)):
        if at is None or constant is None:
            continue
        more -= _freed(constant, at.node)
        if norm.written_out and _key(graph, constant, number) not in context.memo:
            more += _size(constant)
    if not norm.written_out and _key(graph, norm.scale, 1) not in context.memo:
        more += _size(norm.scale)
    if norm.shift is not None and norm.shift.load().any():
        for linear in linears:
            bias = _bias(linear)
            more += linear.d_out - (_freed(bias[0], bias[1]) if bias is not None else 0)
    return "the file would grow: a bias is new, or what holds the old numbers is read elsewhere" if more > 0 else None


def _bias(linear: Linear) -> tuple[Folded, gs.Node] | None:
    last = linear.nodes[-1]
    inputs = last.inputs if last.op == "Add" and last is not linear.node else linear.node.inputs[2:3]
    found = next((folded for folded in map(fold, inputs) if folded is not None), None)
    return None if found is None else (found, last)


def _size(constant: Folded) -> int:
    return int(np.prod(constant.shape, dtype=np.int64))


def _freed(constant: Folded, reader: gs.Node) -> int:
    """Numbers that nothing reads any more once ``reader`` does not."""
    chain = {id(node) for node in (*constant.nodes, reader)}
    source = constant.sources[0] if constant.sources else None
    if source is None or not is_free(source) or any(id(node) not in chain for node in source.outputs):
        return 0
    return _size(constant)


def _scale_input(model: Model, graph: gs.Graph, linear: Linear, scale: Array) -> None:
    """``W ← diag(scale) W``, in the layout that the node reads it in."""
    folded = fold(linear.node.inputs[1])
    assert folded is not None
    old = producer(linear.node.inputs[1])
    build = Builder(model, graph, linear.node.name or "fold_norm", linear.onnx_type)
    axis = 1 if linear.node.attrs.get("transB", 0) else 0
    set_input(linear.node, 1, build.constant(scaled_weight(folded, scale, axis), "weight_with_norm"))
    remove_dead(graph, [old] if old is not None else [])


def _neutralize(model: Model, graph: gs.Graph, norm: Norm, context: Context) -> None:
    """Ones for γ; β away, or zeros where the form needs it."""
    if not (norm.scale.load() == 1).all():
        _put(graph, norm.scale_at, _filled(model, graph, norm.scale, 1, context))
    at = norm.shift_at
    if at is None or norm.shift is None:
        return
    if at.node.op == "LayerNormalization" and model.opset >= 17:
        set_inputs(at.node, at.node.inputs[:2])
    elif at.node.op == "SkipLayerNormalization":
        _put(graph, at, gs.Variable.empty())
    else:
        _put(graph, at, _filled(model, graph, norm.shift, 0, context))


def _put(graph: gs.Graph, at: Slot, tensor: gs.Tensor) -> None:
    old = producer(at.node.inputs[at.index])
    set_input(at.node, at.index, tensor)
    remove_dead(graph, [old] if old is not None else [])


def _key(graph: gs.Graph, like: Folded, number: int) -> tuple[object, ...]:
    return "filled", id(graph), like.shape, like.onnx_type, number


def _filled(model: Model, graph: gs.Graph, like: Folded, number: int, context: Context) -> gs.Constant:
    """An initializer full of ``number``, shaped as ``like``; the same one wherever it is needed again."""
    key = _key(graph, like, number)
    if key not in context.memo:
        name = model.names.fresh(f"{'ones' if number else 'zeros'}_{'x'.join(map(str, like.shape))}")
        constant = gs.Constant(name, InlineValues(np.full(like.shape, number, numpy_type(like.onnx_type))))
        constant.home, constant.was_used = graph, True
        context.memo[key] = constant
    found: gs.Constant = context.memo[key]
    return found
