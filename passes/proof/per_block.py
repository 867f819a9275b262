"""Drift block by block: what each rewritten block causes alone, and what it adds in the chain.

    alone   reference up to the block's edge → the block as the candidate has it → reference to the end
    chain   candidate up to and with the block                                  → reference to the end

Both are compared with the reference at its outputs. One block is looked at at a time, its values held for all feeds, so that
memory is that of one model, two sets of outputs of one feed, and the values at one edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from ...graph.check import reads, sort_nodes
from ...graph.errors import InputError
from ...graph.model import Model
from ...runtime import Feeds, Session, open_session
from ...runtime.metrics import Metrics, OutputMetrics
from ...runtime.padding import Padding
from ...runtime.specs import Array, ValueSpec
from .spans import Span, find_spans

Values = dict[str, Array]


@dataclass(frozen=True)
class BlockDrift:
    """The drift of one block.

    Attributes:
        block, name: of the block in the reference.
        value: what it was compared at itself: the value in which it joins the residual stream.
        own: drift of that value, the block fed with what the reference gives it.
        alone: output → drift with this block rewritten and the rest original.
        chain: output → drift with everything rewritten up to and with this block, and the rest original.
        added: output → ``rel_l2`` of the chain less that of the chain up to the block before.
        reason: why there is none of this; None where there is.
    """

    block: int
    name: str
    value: str = ""
    own: Metrics = field(default_factory=dict)
    alone: Mapping[str, Metrics] = field(default_factory=dict)
    chain: Mapping[str, Metrics] = field(default_factory=dict)
    added: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None

    @property
    def damage(self) -> float:
        """The largest ``rel_l2`` of an output with this block alone rewritten; infinite where numbers are no longer finite."""
        return max((_damage(metrics) for metrics in self.alone.values()), default=-math.inf)

    def to_json(self) -> dict[str, Any]:
        """``verify``'s entry of the block; without ``rank``."""
        if self.reason is not None:
            return {"block": self.block, "name": self.name, "value": None, "reason": self.reason}
        return {"block": self.block, "name": self.name, "value": self.value, **_plain(self.own),
                "alone": {name: _plain(metrics) for name, metrics in self.alone.items()},
                "chain": {name: _plain(metrics) for name, metrics in self.chain.items()}, "added": _plain(self.added)}


def ranked(blocks: Sequence[BlockDrift]) -> list[dict[str, Any]]:
    """The entries of all blocks, in order of execution, with ``rank``: 1 for the one that does most damage alone."""
    order = sorted((each for each in blocks if each.reason is None), key=lambda each: -each.damage)
    ranks = {each.block: rank for rank, each in enumerate(order, 1)}
    return [{**each.to_json(), "rank": ranks.get(each.block)} for each in blocks]


def drift_per_block(reference: Model, candidate: Model, feeds: Feeds, *, provider: str = "cpu", threads: int | None = None,
                    use_tf32: bool = False, logits: Sequence[str] = (),
                    progress: Callable[[int, int], None] = lambda done, total: None) -> list[BlockDrift]:
    """The drift of every FFN block of ``reference``, in order of execution.

    Blocks that lie in a subgraph, whose edge the candidate does not compute (another exporter's file), or for which ONNX
    Runtime does not run a part of one of the models have a ``reason`` instead. What is rewritten between two blocks
    (attention) counts to the chain of the second. An output that a block does not reach keeps, in the chain, what the blocks
    before it did to it.

    Args:
        logits: outputs that are logits, besides one called ``logits``.
        progress: called after each block with how many are done and how many there are.

    Raises:
        InputError: no feeds, or ONNX Runtime refuses one of the models.
    """
    if not len(feeds):
        raise InputError("there are no feeds to compare on: give some with --data, or --synthetic")
    found = find_spans(reference, candidate)
    options = {"provider": provider, "threads": threads, "use_tf32": use_tf32}
    bench = _Bench(reference, found.candidate, found.spans, feeds, options, logits)
    result = [BlockDrift(index, found.names[index], reason=reason) for index, reason in found.left_out.items()]
    before: BlockDrift | None = None
    for done, span in enumerate(found.spans, 1):
        try:
            before = bench.measure(span, before)
            result.append(before)
        except InputError as error:  # of a part of the model alone; the whole runs
            result.append(BlockDrift(span.index, span.name, reason=str(error)))
        progress(done, len(found.spans))
    return sorted(result, key=lambda each: each.block)


@dataclass
class _Edge:
    """What comes out of a block for one feed: in the reference, with it alone rewritten, and at the end of the chain.

    ``alone`` and ``chain`` are None where they equal the reference bit by bit.
    """

    reference: Values
    alone: Values | None
    chain: Values | None


class _Bench:
    """Runs parts of the two models on the feeds."""

    def __init__(self, reference: Model, candidate: Model, spans: Sequence[Span], feeds: Feeds, options: Mapping[str, Any],
                 logits: Sequence[str]) -> None:
        self._ours = reference
        self._theirs = candidate
        self._feeds = feeds
        self._options = options
        edges = list(dict.fromkeys(name for span in spans for name in (*span.given, *span.exits)))
        ours, theirs = (self._open(model, outputs=edges) for model in (reference, candidate))
        given_out = [spec for spec in ours.outputs if spec.name in {info.name for info in reference.graph.outputs}]
        self._outputs = [spec.name for spec in given_out if spec.is_tensor and spec.dtype.kind not in "Oc"]
        self._floating = [spec.name for spec in given_out if spec.floating]
        self._kinds = [{spec.name: spec for spec in session.outputs} for session in (ours, theirs)]
        self._logits = {*logits, "logits"}
        graph = onnx.GraphProto()
        graph.CopyFrom(reference.to_proto()[0].graph)
        sort_nodes(graph)
        self._order = list(graph.node)

    def measure(self, span: Span, before: BlockDrift | None) -> BlockDrift:
        """The drift of a block; ``before`` is that of the block before."""
        own = OutputMetrics(False)
        edges = self._edges(span, own)
        reached = self._reached(span.exits)
        alone, chain = self._continue(span, edges, [name for name in self._outputs if name in reached])
        if before is not None:  # what lies ahead of the block stays as the chain has left it
            chain |= {name: metrics for name, metrics in before.chain.items() if name not in reached}
        added = {name: _damage(chain[name]) - (_damage(before.chain[name]) if before is not None else 0.0)
                 for name in self._floating}
        return BlockDrift(span.index, span.name, span.exits[0], own.result(), alone, chain, added)

    def _open(self, model: Model, **parts: Any) -> Session:
        return open_session(model, lean=True, **self._options, **parts)

    def _edges(self, span: Span, own: OutputMetrics) -> list[_Edge]:
        """Run up to the block and through it, on every feed."""
        through = [self._open(model, outputs=span.exits, inputs={name: kinds[name].element_type for name in span.given})
                   for model, kinds in zip((self._ours, self._theirs), self._kinds, strict=True)]
        needed = [name for name in span.given if any(spec.name == name for session in through for spec in session.inputs)]
        wanted = [*needed, *span.exits]
        up_to = [self._open(model, outputs=wanted, only=True) for model in (self._ours, self._theirs)]
        edges = []
        for feed in self._feeds:
            first, second = up_to[0].run(feed, wanted), up_to[1].run(feed, wanted)
            given = {name: first[name] for name in needed}
            as_theirs = {name: _as(value, self._kinds[1][name]) for name, value in given.items()}
            original, rewritten = ({name: values[name] for name in span.exits}
                                   for values in (_run(through[0], feed, given), _run(through[1], feed, as_theirs)))
            name = span.exits[0]
            _check_shapes(name, original[name], rewritten[name])
            own.update(original[name], rewritten[name], Padding(feed))
            exits = {name: first[name] for name in span.exits}
            edges.append(_Edge(exits, self._changed(original, rewritten),
                               self._changed(exits, {name: second[name] for name in exits})))
        return edges

    def _changed(self, original: Values, rewritten: Values) -> Values | None:
        """``rewritten`` in the reference's types, or None where it equals ``original``."""
        for name, value in original.items():
            _check_shapes(name, value, rewritten[name])
        if all(_same(value, rewritten[name]) for name, value in original.items()):
            return None
        return {name: _as(rewritten[name], self._kinds[0][name]) for name in original}

    def _reached(self, exits: Sequence[str]) -> set[str]:
        """What is computed from ``exits``, themselves included."""
        found = set(exits)
        for node in self._order:
            if not found.isdisjoint(reads(node)):
                found.update(node.output)
        return found

    def _continue(self, span: Span, edges: Sequence[_Edge],
                  reached: Sequence[str]) -> tuple[dict[str, Metrics], dict[str, Metrics]]:
        """Go on with the reference from the block's edge to the outputs that it reaches."""
        metrics = [{name: OutputMetrics(name in self._logits) for name in self._outputs} for _ in ("alone", "chain")]
        if any(edge.alone is not None or edge.chain is not None for edge in edges):
            further = [name for name in reached if name not in span.exits]
            onwards = self._open(self._ours, outputs=further, inputs={name: self._kinds[0][name].element_type
                                                                      for name in span.exits}) if further else None
            for feed, edge in zip(self._feeds, edges, strict=True):
                self._compare(onwards, feed, edge, [{name: found[name] for name in reached} for found in metrics])
        alone, chain = ({name: each.result() for name, each in found.items()} for found in metrics)
        return alone, chain

    def _compare(self, onwards: Session | None, feed: Mapping[str, Any], edge: _Edge,
                 metrics: list[dict[str, OutputMetrics]]) -> None:
        padding = Padding(feed)
        first = _run(onwards, feed, edge.reference)
        second: Values = {}
        ran: Values | None = None
        for values, found in ((edge.alone, metrics[0]), (edge.chain, metrics[1])):
            if values is None:
                second = first
            elif ran is None or any(not _same(values[name], ran[name]) for name in values):
                second = {}  # let go of the outputs before
                second, ran = _run(onwards, feed, values), values
            for name, each in found.items():
                _check_shapes(name, first[name], second[name])
                each.update(first[name], second[name], padding)


def _run(session: Session | None, feed: Mapping[str, Any], given: Values) -> Values:
    """``given``, and what ``session`` gives, fed with those of ``feed`` and ``given`` that it takes."""
    if session is None:
        return given
    taken = {spec.name for spec in session.inputs}
    return {**given, **session.run({name: value for name, value in {**feed, **given}.items() if name in taken}, of=feed)}


def _as(value: Array, spec: ValueSpec) -> Array:
    return value if value.dtype == spec.dtype else value.astype(spec.dtype)


def _same(first: Array, second: Array) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


def _check_shapes(name: str, first: Array, second: Array) -> None:
    if first.shape != second.shape:
        raise InputError(f"value '{name}': the reference gives the shape {list(first.shape)}, the candidate "
                         f"{list(second.shape)}")


def _damage(metrics: Metrics) -> float:
    size = metrics["rel_l2"]
    if metrics["nonfinite"] is None:  # no row was compared
        return 0.0
    return math.inf if metrics["nonfinite"] or size is None or not math.isfinite(size) else size


def _plain(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None or not math.isfinite(value) else value for name, value in numbers.items()}
