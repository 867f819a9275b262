"""fuse-attention: what mixes tokens in attention becomes one operator of ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from ..graph.attention_core import AttentionCore, known_heads, read_attention_core
from ..graph.builder import Builder
from ..graph.edit import remove_dead, take_over
from ..graph.errors import InputError
from ..graph.model import Model
from ..graph.rejection import Refusal
from ..runtime import Feed, Feeds, InputSpec, input_specs, open_session, synthetic_feeds
from ..runtime.executed import executed_ops
from .base import Context, Pass, PassResult, Refused
from .exact.trial import why_not_same

_SAME = 1e-3
_SEVERAL = 3, 7
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Write what mixes tokens in attention as one operator, ``com.microsoft.MultiHeadAttention``.

        softmax(s · (Q_n K_nᵀ) + M) V_n, all heads n beside each other
                →   MultiHeadAttention(Q, K, V, attention_bias=M; num_heads=N, scale=s)

    Q, K, V ``[batch, tokens, N · d]`` as the linears give them; the operator divides them into heads by itself, so that four
    Transposes of the whole value and a pass over all scores for the scale are gone; without a mask the CPU's kernel keeps the
    scores of a few tokens in the cache and writes none (as FlashAttention, arXiv 2205.14135). The same but for rounding. The
    file runs in ONNX Runtime alone then, which is why no default plan does it.

    Looks at what lies between the Reshapes into heads and back, whatever the linears around it are (float, integers). It is
    tried before it is done: the outputs must be the same on a made-up feed of several sequences and on the first of those given.

    Does not fire where scores or probabilities are read elsewhere, on rotary positions or repeated heads (grouped queries)
    between the Reshape and the product, on another mask than one that is added, inside If, Loop and Scan, where ONNX Runtime
    has no kernel for it (double precision), nor where it fuses attention by itself, projections included (it is asked).
    Source: MultiHeadAttention in ONNX Runtime's ContribOperators.md.
    """

    name: ClassVar[str] = "fuse-attention"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite every core of the main graph, or say why not."""
        cores, refused = _cores(model)
        if not cores:
            return self.result(0, refused)
        try:
            feeds = _feeds(model, context)
            runs = [_shapes(model, cores, feed, context) for feed in feeds]
            reasons = {core.softmax.outputs[0].name: [_why_not(core, shapes) for shapes in runs] for core in cores}
            unfit = {name: next(filter(None, found)) for name, found in reasons.items() if any(found)}
            trial = model.copy()
            unfit |= dict.fromkeys(_rewrite(trial, runs[0], unfit), "its shape is read elsewhere as well")
            if unfit:
                trial = model.copy()
                _rewrite(trial, runs[0], unfit)
            refused += [Refused(reason, name) for name, reason in unfit.items()]
            if len(unfit) < len(cores):
                context.progress("fuse-attention: trying it")
                wrong = why_not_same(model, trial, Feeds.of(feeds), _SAME, "it comes out otherwise", context)
                wrong = wrong or _why_more(model, trial, context)
                if wrong is not None:
                    return self.result(0, [*refused, wrong])
        except InputError as error:
            return self.result(0, [*refused, Refused(f"it could not be tried: {' '.join(str(error).split())}")])
        _rewrite(model, runs[0], unfit)
        return self.result(len(cores) - len(unfit), refused)


def _feeds(model: Model, context: Context) -> list[Feed]:
    """A made-up feed of several sequences, if the model takes it, and the first of those given."""
    specs = input_specs(model)
    made = dict(synthetic_feeds(specs, _several(specs), model=model, provider=context.provider)[0])
    given = [context.fit[0]] if context.fit else []
    try:
        with contextlib.closing(open_session(model, provider=context.provider, threads=context.threads, lean=True)) as session:
            session.run(made)
    except InputError:
        return given or [synthetic_feeds(specs, model=model, provider=context.provider)[0]]
    return [made, *given]


def _several(specs: Sequence[InputSpec]) -> dict[str, tuple[int, ...]]:
    """Sizes for the first input whose open dimensions are the first, and the second: a batch of 3, 7 tokens."""
    for spec in specs:
        open_axes = [axis for axis, dim in enumerate(spec.shape or ()) if not isinstance(dim, int)]
        if open_axes in ([0], [0, 1], [1]):
            sizes = (dim if isinstance(dim, int) else _SEVERAL[axis] for axis, dim in enumerate(spec.shape or ()))
            return {spec.name: tuple(sizes)}
    return {}


def _why_more(before: Model, after: Model, context: Context) -> Refused | None:
    """ONNX Runtime fuses some attention by itself, projections included; that is asked, not guessed."""
    nodes, more = (executed_ops(each, provider=context.provider, threads=1).total() for each in (before, after))
    return Refused(f"ONNX Runtime would execute {more} nodes in the place of {nodes}: it fuses this attention by itself"
                   ) if more > nodes else None


def _cores(model: Model) -> tuple[list[AttentionCore], list[Refused]]:
    graph = model.graphs()[0][1]
    found = [read_attention_core(graph, node) for node in graph.nodes if node.op == "Softmax"]
    return ([each for each in found if isinstance(each, AttentionCore)],
            [Refused(each.reason, each.value) for each in found if isinstance(each, Refusal)])


def _shapes(model: Model, cores: Sequence[AttentionCore], feed: Mapping[str, Any], context: Context) -> Shapes:
    """Shapes in one run, by name: what is divided into heads, what becomes of it, and masks."""
    constants = {core.mask.name: tuple(core.mask.shape) for core in cores if isinstance(core.mask, gs.Constant)}
    wanted = [tensor for core in cores for tensor in (core.q, core.k, core.v, core.output)]
    wanted += [node.outputs[0] for core in cores for node in core.reshapes]
    wanted += [core.mask for core in cores if core.mask is not None and core.mask.name not in constants]
    given = {tensor.name for tensor in model.graphs()[0][1].inputs}
    names = list(dict.fromkeys(tensor.name for tensor in wanted if tensor.name not in given))
    session = open_session(model, provider=context.provider, threads=context.threads, outputs=names, only=True, lean=True)
    taken = {spec.name for spec in session.inputs}
    values = session.run({name: value for name, value in feed.items() if name in taken}, names)
    session.close()
    return {**constants, **{name: np.shape(value) for name, value in (*values.items(), *feed.items())}}


def _why_not(core: AttentionCore, shapes: Shapes) -> str | None:
    wanted = [core.q, core.k, core.v, core.output, *(node.outputs[0] for node in core.reshapes),
              *([] if core.mask is None else [core.mask])]
    if any(tensor.name not in shapes for tensor in wanted):
        return "its shapes are not known"
    sizes = [shapes[tensor.name] for tensor in (core.q, core.k, core.v)]
    parts = [shapes[node.outputs[0].name] for node in core.reshapes]
    if any(len(size) != 3 or len(part) != 4 or part[:2] != size[:2] for size, part in zip(sizes, parts, strict=True)):
        return "what is divided into heads is no [batch, tokens, heads · d]"
    if len({size[0] for size in sizes}) > 1 or sizes[1][1] != sizes[2][1]:
        return "its queries, keys and values are not of one batch, or keys and values not of as many tokens"
    if shapes[core.output.name] != (*sizes[0][:2], sizes[2][2]):
        return f"its heads are put beside each other as {list(shapes[core.output.name])}"
    if len({part[2] for part in parts}) > 1 or parts[0][3] != parts[1][3]:
        return "its heads are not alike"
    for node, part in zip(core.reshapes, parts, strict=True):
        said = known_heads(node)
        if said is None or any(dim not in (-1, size) for dim, size in zip(said, part[2:], strict=True)):
            return "the number of its heads is not known"
    if core.mask is None:
        return None
    mask = (1,) * (4 - len(shapes[core.mask.name])) + shapes[core.mask.name]
    largest = (parts[0][0], parts[0][2], parts[0][1], parts[1][1])
    if len(mask) != 4 or mask[3] != largest[3] or any(dim not in (1, most) for dim, most in zip(mask, largest, strict=True)):
        return f"its mask is {list(shapes[core.mask.name])}"
    return None


def _rewrite(model: Model, shapes: Shapes, but: Collection[str]) -> list[str]:
    """Rewrite all cores ``but`` some; those that something still needs, by the name of their probabilities."""
    graph = model.graphs()[0][1]
    left = []
    for core in _cores(model)[0]:
        name = core.softmax.outputs[0].name
        if name in but:
            continue
        build = Builder(model, graph, core.softmax.name or "/attention")
        heads = shapes[core.reshapes[0].outputs[0].name][2]
        bias = [] if core.mask is None else [gs.Variable.empty(), gs.Variable.empty(), _mask(build, core, shapes)]
        inputs = [core.q, core.k, core.v, *bias]
        take_over(core.output, build.contrib("MultiHeadAttention", *inputs, hint="fused", num_heads=heads, scale=core.scale))
        remove_dead(graph, [core.last])
        if any(node is core.softmax for node in graph.nodes):
            left.append(name)
    return left


def _mask(build: Builder, core: AttentionCore, shapes: Shapes) -> gs.Tensor:
    """The mask as ``[1 or batch, 1 or heads, S, T]``, which the operator wants."""
    assert core.mask is not None
    mask, shape = core.mask, shapes[core.mask.name]
    ahead = 4 - len(shape)
    if ahead:
        axes = list(range(ahead))
        mask = (build.op("Unsqueeze", mask, build.integers(axes, "axes"), hint="mask") if build.model.opset >= 13
                else build.op("Unsqueeze", mask, hint="mask", axes=axes))
    if ((1,) * ahead + shape)[2] == 1:
        tokens = build.op("Slice", build.op("Shape", core.q, hint="sizes"), build.integers([1], "start"),
                          build.integers([2], "end"), hint="tokens")
        one = build.integers([1], "one")
        mask = build.op("Expand", mask, build.op("Concat", one, one, tokens, one, hint="mask_shape", axis=0), hint="mask_rows")
    return mask
