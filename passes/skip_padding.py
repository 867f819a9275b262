"""skip-padding: tokens that are padding are not computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..graph.edit import producer
from ..graph.errors import InputError
from ..graph.model import Model
from ..graph.token_wise import Kind, is_product
from ..runtime import InputSpec, input_specs, open_session
from .base import Context, Pass, PassResult, Refused
from .exact.packing import Packer, packable
from .exact.padding_trial import MASK, SIZES, made_up, try_padding

_TOKENS = ("input_ids", "inputs_embeds")
_OLDEST = 11  # opset
_ROUNDING = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul"})
_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_SAME, _SAME_HALF, _SAME_ROUNDED = 1e-3, 3e-2, 0.5
"""Relative error against the model as it was: float32, float16, and where scales are taken over all rows, padding or not."""


@dataclass(frozen=True)
class SkipPadding(Pass):
    """Compute what is computed for each token by itself for the tokens that are no padding.

        y[b, t] = f(x[b, t])  for all b, t   →   y[b, t] = f(x[b, t])  where attention_mask[b, t] ≠ 0

    Linears, norms, activations and residual sums, of attention and FFN alike, work on ``[1, n, d]``, the n rows that are no
    padding (on ``[n, d]`` where an exporter flattens); what mixes tokens (softmax(q kᵀ) v, pooling) gets
    ``[batch, tokens, d]`` back, in which a row of padding repeats the token before it. The rows that are no padding stay the
    same but for the order of sums; with int8 whose scale is taken over the whole value they get finer, as padding does not
    count any more. An output with a row for each token holds repetitions where there is padding. The time of those parts
    falls by the part of the tokens that is padding; where there is none, a few copies are made for nothing.

    It is tried before it is done, on made-up feeds that are padded at the end and in front, and on that of the feeds given that
    has the most padding: the outputs must be the same, and the same again when other numbers stand in the rows of padding.
    Where that holds on one side alone (an output reads the first token, or the last), it is done for that side and said.

    Does not fire without an input ``attention_mask [batch, tokens]`` of the same two dimensions as ``input_ids`` or
    ``inputs_embeds`` (a decoder with a past has a longer one), where an output reads rows of padding (a mean over all
    tokens), below opset 11, nor inside If, Loop and Scan. Put it last in a plan: other passes look for blocks on a stream of
    tokens. Source: the packing of Effective Transformer (ByteDance, 2020) and of ByteTransformer (arXiv 2210.03052).
    """

    name: ClassVar[str] = "skip-padding"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite the main graph, or say why not."""
        try:
            found = _prepare(model, context)
        except InputError as error:
            found = Refused(f"it could not be tried: {' '.join(str(error).split())}")
        if isinstance(found, Refused):
            return self.result(0, [found])
        measured, notes = found
        return self.result(_pack(model, measured), [], notes)


@dataclass(frozen=True)
class _Measured:
    """What two runs of different sizes, [batch, tokens] each, show: shapes of the values of the main graph, by name, and whether
    there are numbers of 16 bits."""

    shapes: tuple[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]]]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    halves: bool

    def kind(self, tensor: gs.Tensor) -> Kind:
        known = tuple(tensor.shape) if isinstance(tensor, gs.Constant) else None
        first, second = (known if known is not None else shapes.get(tensor.name) for shapes in self.shapes)
        if first is None or second is None:
            return Kind.OTHER
        if len(first) == len(second) == 3 and (first[:2], second[:2]) == self.sizes and first[2] == second[2]:
            return Kind.TOKENS
        if len(first) == len(second) == 2 and first[0] != second[0] and first[1] == second[1] and (
                first[0], second[0]) == tuple(batch * tokens for batch, tokens in self.sizes):
            return Kind.OTHER if _was_turned(tensor, self.kind) else Kind.FLAT
        if first == second and len(first) <= 3 and all(dim == 1 for dim in first[:-1]):
            return Kind.SAME
        return Kind.MATRIX if first == second and len(first) == 2 else Kind.OTHER

    def width(self, tensor: gs.Tensor) -> int:
        return self.shapes[0][tensor.name][-1]


def _was_turned(tensor: gs.Tensor, kind: Callable[[gs.Tensor], Kind]) -> bool:
    """Whether rows come from something that is not [batch, tokens, d], as [tokens, batch, d], whose rows are in another order."""
    node = producer(tensor)
    return node is not None and node.op in ("Reshape", "Flatten") and kind(node.inputs[0]) is Kind.OTHER


def _prepare(model: Model, context: Context) -> tuple[_Measured, tuple[str, ...]] | Refused:
    """What there is to be packed, once it is known to change nothing, and what the user should know."""
    specs = input_specs(model)
    refused = _why_no_mask(model, specs)
    if refused is not None:
        return refused
    context.progress("skip-padding: shapes of all values")
    found = _measure(model, specs, context)
    if not any(is_product(node) for node in packable(model.graphs()[0][1], found.kind, model.opset)):
        return Refused("no linear works on values [batch, tokens, d] or [batch · tokens, d]", MASK)
    context.progress("skip-padding: trying it on padding")
    packed, other = model.copy(), model.copy()
    _pack(packed, found)
    _pack(other, found, following=True)
    tried = try_padding(model, packed, other, _bound(model, found), context, specs)
    return tried if isinstance(tried, Refused) else (found, tried)


def _why_no_mask(model: Model, specs: Sequence[InputSpec]) -> Refused | None:
    if model.opset < _OLDEST:
        return Refused(f"opset {model.opset} has no CumSum: it takes opset {_OLDEST} or later")
    named = {spec.name: spec for spec in specs}
    mask, tokens = named.get(MASK), next((named[name] for name in _TOKENS if name in named), None)
    if mask is None or tokens is None:
        return Refused(f"there is no input '{MASK}' beside '{_TOKENS[0]}' or '{_TOKENS[1]}' that says what is padding",
                       MASK if mask is None else _TOKENS[0])
    if mask.shape is None or len(mask.shape) != 2 or None in mask.shape or mask.shape != (tokens.shape or ())[:2]:
        return Refused(f"it is {mask.shape_text} and '{tokens.name}' {tokens.shape_text}: they must say to be of one batch and "
                       "as many tokens", MASK)
    twin = next((spec for spec in specs if spec.name.startswith("decoder") and (spec.shape or ())[:2] == mask.shape), None)
    if twin is not None:
        return Refused(f"'{twin.name}' has as many tokens by its dimensions, and padding of its own", MASK)
    return None


def _measure(model: Model, specs: Sequence[InputSpec], context: Context) -> _Measured:
    graph = model.graphs()[0][1]
    names = [tensor.name for node in graph.nodes for tensor in node.outputs if tensor.name]
    session = open_session(model, provider=context.provider, threads=context.threads, outputs=names, lean=True)
    tensors = [spec.name for spec in session.outputs if spec.is_tensor]
    found = []
    for sizes in SIZES:
        feed = made_up(model, specs, sizes)
        values = session.run(feed, tensors)
        shapes = {name: np.shape(value) for name, value in (*values.items(), *feed.items())}
        found.append((shapes, feed[MASK].shape))
    session.close()
    halves = any(spec.element_type in _HALVES for spec in session.outputs)
    return _Measured((found[0][0], found[1][0]), (found[0][1], found[1][1]), halves)


def _bound(model: Model, found: _Measured) -> float:
    nodes = packable(model.graphs()[0][1], found.kind, model.opset)
    if any(node.op in _ROUNDING for node in nodes):
        return _SAME_ROUNDED
    return _SAME_HALF if found.halves else _SAME


def _pack(model: Model, found: _Measured, *, following: bool = False) -> int:
    """Rewrite the main graph of ``model``; how many products work on packed rows then."""
    graph = model.graphs()[0][1]
    nodes = packable(graph, found.kind, model.opset)
    mask = next(tensor for tensor in graph.inputs if tensor.name == MASK)
    Packer(model, graph, mask, found.kind, found.width, following).pack(nodes)
    return sum(is_product(node) for node in nodes)
