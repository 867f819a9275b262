"""Values that do not depend on the input, read through whatever an exporter wrapped around them.

A weight may be an initializer, a Constant node, or either behind Identity, Cast, Transpose, Reshape, Squeeze, Unsqueeze,
Gather, Slice or DequantizeLinear. ``fold`` finds shape and type without reading the weight; ``load`` computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from .edit import producer
from .errors import InputError
from .types import FLOATS, numpy_type
from .weights import size_of

Array = npt.NDArray[Any]
_DEPTH = 16
_LARGEST_PRODUCT = 1 << 28  # numbers in a product of two constants, as of low-rank adapters
_MOST_NODES = 64  # between a value and what it is computed from; a value used twice counts twice, also in time
_MOST_AXES = 64
_MOST_GROWN = 1 << 20  # elements, where they are more than twice as many as stored: a Gather can make anything of little


@dataclass(eq=False)
class Folded:
    """A value known when the model is built.

    Attributes:
        shape: its dimensions.
        onnx_type: its element type (``TensorProto.DataType``).
        load: computes a fresh array of that shape.
        sources: the initializers or Constant attributes it is computed from, the weight itself first.
        nodes: the nodes between those and the value, outermost first.
        quantized: a DequantizeLinear is among them.
        overridable: it comes from an initializer that is also an input, so the caller may give another value.
        experts: more than 1 where the value is one of so many along the first axis, chosen at run time (``picked.py``).
    """

    shape: tuple[int, ...]
    onnx_type: int
    load: Callable[[], Array]
    sources: list[gs.Constant]
    nodes: list[gs.Node] = field(default_factory=list)
    quantized: bool = False
    overridable: bool = False
    experts: int = 1

    @property
    def size(self) -> int:
        """Numbers in the value (in one of the experts' where it is packed)."""
        return int(np.prod(self.shape, dtype=np.int64)) // max(self.experts, 1)


_known: ContextVar[dict[int, tuple[gs.Tensor, Folded | None]] | None] = ContextVar("known", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """While this lasts nothing is edited, so :func:`fold` looks at each value once."""
    before = _known.set({})
    try:
        yield
    finally:
        _known.reset(before)


def fold(tensor: gs.Tensor) -> Folded | None:
    """``tensor`` as a constant, or None if it depends on an input (or is computed in a way not read here)."""
    known = _known.get()
    if known is None:
        return _fold(tensor, _DEPTH)
    if id(tensor) not in known:
        known[id(tensor)] = (tensor, _fold(tensor, _DEPTH))  # with the tensor, so that its id stays its own
    return known[id(tensor)][1]


def _fold(tensor: gs.Tensor, depth: int) -> Folded | None:
    if isinstance(tensor, gs.Constant):
        values = tensor._values
        return Folded(tuple(values.shape), values.onnx_type, values.load, [tensor])
    node = producer(tensor)
    default = getattr(tensor, "default", None)
    if default is not None:
        return Folded(tuple(default.shape), default.onnx_type, default.load, [tensor], overridable=True)
    if node is None or depth == 0:
        return None
    if node.op == "Constant" and not node.domain:
        return _constant_node(node)
    rule = _RULES.get(node.op)
    if rule is None or node.domain not in (None, "", "ai.onnx"):
        return None
    if len(node.outputs) != 1:
        return None
    parts: list[Folded | None] = []
    for value in node.inputs:
        part = _fold(value, depth - 1) if value.name else None
        if part is None and value.name:
            return None
        parts.append(part)
    held = [part for part in parts if part is not None]
    if sum(len(part.nodes) for part in held) >= _MOST_NODES:
        return None
    result = _apply(rule, node, parts)
    if result is None:
        return None
    result.nodes = [node, *(inner for part in held for inner in part.nodes)]
    result.sources = [source for part in held for source in part.sources]
    result.quantized |= any(part.quantized for part in held)
    result.overridable = any(part.overridable for part in held)
    stored = sum(size_of(getattr(source, "default", source).shape) for source in result.sources)
    return result if size_of(result.shape) <= max(_MOST_GROWN, 2 * stored) else None


def _apply(rule: Callable[..., Folded | None], node: gs.Node, parts: list[Folded | None]) -> Folded | None:
    """What ``rule`` makes of ``parts``; None where the node is not as its operator should be."""
    try:
        result = rule(node, *parts)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return None  # shapes that do not fit, inputs or attributes that are missing: ONNX Runtime will say so
    if result is not None:
        result.load = partial(_load, node, result.load)
    return result


def _load(node: gs.Node, load: Callable[[], Array]) -> Array:
    """What ``node`` computes, where it can be computed."""
    try:
        return load()
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise InputError(f"node '{node.name or node.op}' computes a constant that cannot be computed "
                         f"({' '.join(str(error).split())[:200]}): export the model again") from None


def _few(part: Folded) -> list[int]:
    """The integers in ``part``, which has one for each axis of something."""
    if size_of(part.shape) > _MOST_AXES:
        raise ValueError("more axes than an array can have")
    return [int(number) for number in part.load().reshape(-1)]


def small(tensor: gs.Tensor, limit: int = 1 << 20) -> Array | None:
    """The array of a constant of at most ``limit`` elements, else None."""
    folded = fold(tensor)
    if folded is None or size_of(folded.shape) > limit:
        return None
    return folded.load()


def scalar(tensor: gs.Tensor) -> float | None:
    """The number in a constant of one element, else None."""
    folded = fold(tensor)
    if folded is None or any(dim != 1 for dim in folded.shape):
        return None
    return float(folded.load().reshape(()).astype(np.float64))


def integers(tensor: gs.Tensor) -> list[int] | None:
    """The numbers in a constant list of integers, else None."""
    values = small(tensor, 1 << 16)
    return None if values is None or values.dtype.kind not in "iu" else [int(v) for v in values.reshape(-1)]


def _constant_node(node: gs.Node) -> Folded | None:
    if "value" in node.attrs and isinstance(node.attrs["value"], gs.Constant):
        constant = node.attrs["value"]
        return Folded(tuple(constant._values.shape), constant._values.onnx_type, constant._values.load, [constant], [node])
    for key, kind in (("value_float", np.float32), ("value_floats", np.float32),
                      ("value_int", np.int64), ("value_ints", np.int64)):
        if key in node.attrs:
            array = np.asarray(node.attrs[key], kind)
            return _computed(array.shape, onnx.TensorProto.FLOAT if kind is np.float32 else onnx.TensorProto.INT64,
                             array.copy, nodes=[node])
    return None


def _computed(shape: tuple[int, ...], onnx_type: int, load: Callable[[], Array], nodes: list[gs.Node] | None = None,
              quantized: bool = False) -> Folded:
    return Folded(tuple(shape), onnx_type, load, [], nodes or [], quantized)


def _identity(node: gs.Node, x: Folded, *_: Folded | None) -> Folded:
    return _computed(x.shape, x.onnx_type, x.load)


def _cast(node: gs.Node, x: Folded, like: Folded | None = None) -> Folded:
    kind = like.onnx_type if like is not None else int(node.attrs["to"])
    return _computed(x.shape, kind, lambda: x.load().astype(numpy_type(kind)))


def _transpose(node: gs.Node, x: Folded) -> Folded:
    perm = node.attrs.get("perm") or list(range(len(x.shape)))[::-1]
    return _computed(tuple(x.shape[axis] for axis in perm), x.onnx_type, lambda: x.load().transpose(perm))


def _reshape(node: gs.Node, x: Folded, shape: Folded) -> Folded | None:
    target = _few(shape)
    if not node.attrs.get("allowzero", 0):
        target = [x.shape[i] if dim == 0 and i < len(x.shape) else dim for i, dim in enumerate(target)]
    size = size_of(x.shape)
    if target.count(-1) == 1:
        rest = size_of(tuple(dim for dim in target if dim != -1))
        target[target.index(-1)] = size // rest if rest else 0
    if size_of(tuple(target)) != size or min(target, default=0) < 0:
        return None
    return _computed(tuple(target), x.onnx_type, lambda: x.load().reshape(target))


def _axes(node: gs.Node, axes: Folded | None) -> list[int] | None:
    if axes is not None:
        return _few(axes)
    found = node.attrs.get("axes")
    return None if found is None else list(found)


def _unsqueeze(node: gs.Node, x: Folded, axes: Folded | None = None) -> Folded | None:
    where = _axes(node, axes)
    if where is None:
        return None
    rank = len(x.shape) + len(where)
    chosen = {axis % rank for axis in where}
    rest = iter(x.shape)
    shape = tuple(1 if i in chosen else next(rest) for i in range(rank))
    return _computed(shape, x.onnx_type, lambda: x.load().reshape(shape))


def _squeeze(node: gs.Node, x: Folded, axes: Folded | None = None) -> Folded:
    where = _axes(node, axes)
    gone = {axis % len(x.shape) for axis in where} if where else {i for i, dim in enumerate(x.shape) if dim == 1}
    shape = tuple(dim for i, dim in enumerate(x.shape) if i not in gone)
    return _computed(shape, x.onnx_type, lambda: x.load().reshape(shape))


def _gather(node: gs.Node, x: Folded, indices: Folded) -> Folded:
    axis = int(node.attrs.get("axis", 0)) % len(x.shape)
    shape = x.shape[:axis] + indices.shape + x.shape[axis + 1:]
    return _computed(shape, x.onnx_type, lambda: np.take(x.load(), indices.load().astype(np.int64), axis=axis))


def _slice(node: gs.Node, x: Folded, *bounds: Folded | None) -> Folded | None:
    if bounds:
        numbers = [None if part is None else _few(part) for part in bounds]
    else:
        numbers = [list(node.attrs["starts"]), list(node.attrs["ends"]), node.attrs.get("axes")]
    numbers += [None] * (4 - len(numbers))
    starts, ends, axes, steps = numbers
    if starts is None or ends is None:
        return None
    index: list[slice] = [slice(None)] * len(x.shape)
    for i, axis in enumerate(axes or range(len(starts))):
        step = steps[i] if steps else 1
        end: int | None = ends[i]
        if step < 0 and ends[i] < -x.shape[axis]:
            end = None
        index[axis % len(x.shape)] = slice(starts[i], end, step)
    shape = tuple(len(range(*part.indices(dim))) for part, dim in zip(index, x.shape, strict=True))
    return _computed(shape, x.onnx_type, lambda: x.load()[tuple(index)])


def _dequantize(node: gs.Node, x: Folded, scale: Folded, zero: Folded | None = None) -> Folded:
    axis = int(node.attrs.get("axis", 1))
    block = int(node.attrs.get("block_size", 0) or 0)
    kind = int(node.attrs.get("output_dtype", 0)) or scale.onnx_type

    def load() -> Array:
        scales = _spread(scale.load().astype(np.float32), x.shape, axis, block)
        zeros: Array = np.zeros((), np.float32)
        if zero is not None:
            zeros = _spread(zero.load().astype(np.float32), x.shape, axis, block)
        result: Array = ((x.load().astype(np.float32) - zeros) * scales).astype(numpy_type(kind))
        return result

    return _computed(x.shape, kind, load, quantized=True)


def _spread(values: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Per-tensor, per-axis or blocked parameters so that they broadcast against ``shape``."""
    if values.size == 1:
        return values.reshape(())
    if block:
        return np.repeat(values, block, axis=axis)[tuple(slice(dim) for dim in shape)]
    view = [1] * len(shape)
    view[axis % len(shape)] = -1
    return values.reshape(view)


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Folded | None]:
    def rule(node: gs.Node, a: Folded, b: Folded) -> Folded:
        return _computed(np.broadcast_shapes(a.shape, b.shape), a.onnx_type,
                         lambda: np.asarray(function(a.load(), b.load())))
    return rule


def _divide(node: gs.Node, a: Folded, b: Folded) -> Folded | None:
    if a.onnx_type not in FLOATS:
        return None
    return _computed(np.broadcast_shapes(a.shape, b.shape), a.onnx_type, lambda: np.asarray(a.load() / b.load()))


def _power(node: gs.Node, a: Folded, b: Folded) -> Folded | None:
    if a.onnx_type not in FLOATS:
        return None
    return _computed(np.broadcast_shapes(a.shape, b.shape), a.onnx_type,
                     lambda: np.asarray(np.power(a.load(), b.load())).astype(numpy_type(a.onnx_type)))


def _matmul(node: gs.Node, a: Folded, b: Folded) -> Folded | None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.onnx_type not in FLOATS:
        return None
    if a.shape[1] != b.shape[0] or a.shape[0] * b.shape[1] > _LARGEST_PRODUCT:
        return None
    return _computed((a.shape[0], b.shape[1]), a.onnx_type, lambda: np.asarray(a.load() @ b.load()))


def _concat(node: gs.Node, *parts: Folded | None) -> Folded | None:
    whole = [part for part in parts if part is not None]
    axis = int(node.attrs.get("axis", 0)) % max(len(whole[0].shape), 1)
    rests = {(*part.shape[:axis], *part.shape[axis + 1:]) for part in whole}
    if len(whole) != len(parts) or len(rests) != 1 or len({part.onnx_type for part in whole}) != 1:
        return None
    if any(axis >= len(part.shape) for part in whole):
        return None
    first = whole[0].shape
    shape = (*first[:axis], sum(part.shape[axis] for part in whole), *first[axis + 1:])
    return _computed(shape, whole[0].onnx_type, lambda: np.concatenate([part.load() for part in whole], axis))


_RULES: dict[str, Callable[..., Folded | None]] = {
    "Identity": _identity, "Cast": _cast, "CastLike": _cast, "Transpose": _transpose, "Reshape": _reshape,
    "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Gather": _gather, "Slice": _slice, "DequantizeLinear": _dequantize,
    "Add": _binary(np.add), "Sub": _binary(np.subtract), "Mul": _binary(np.multiply),
    "Div": _divide, "Pow": _power, "MatMul": _matmul, "Concat": _concat,
}
