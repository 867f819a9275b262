"""Where numbers first stop being finite inside a model, as in float16 where 65504 is the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ..graph.check import reads, sort_nodes
from ..graph.model import Model
from .feeds import Feed, Feeds
from .sessions import open_session
from .specs import Array

_AT_ONCE = 48  # values looked at in one run, so that only they are held


@dataclass(frozen=True)
class Overflow:
    """The first node that makes infinities or NaN out of finite numbers.

    Attributes:
        node, op: the node.
        value: its output.
        feed: number of the feed on which it happens, from 0.
        count: elements of ``value`` that are not finite.
        largest_input: the largest absolute number among what it computes from; None where it reads constants only.
        reaches_output: whether an output of the model is not finite on that feed.
    """

    node: str
    op: str
    value: str
    feed: int
    count: int
    largest_input: float | None
    reaches_output: bool

    def to_json(self) -> dict[str, Any]:
        """``verify``'s entry ``first_nonfinite``."""
        return vars(self).copy()

    def __str__(self) -> str:
        inputs = "" if self.largest_input is None else f", its inputs reach {self.largest_input:.4g}"
        ends = "" if self.reaches_output else "; the outputs are finite again on this provider"
        return (f"{self.op} node '{self.node}' is the first whose numbers are not finite: {self.count} of '{self.value}' "
                f"on feed {self.feed}{inputs}{ends}")


@dataclass(frozen=True)
class _Seen:
    """What was found in a value: elements that are not finite, whether any is more than −∞, the largest finite one."""

    nonfinite: int
    harmful: bool
    largest: float


_NOTHING = _Seen(0, False, 0.0)


def has_float16(model: Model) -> bool:
    """Whether any weight or edge of ``model`` is in float16."""
    graph = model.proto.graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {info.type.tensor_type.elem_type for info in (*graph.input, *graph.output, *graph.value_info)}
    return onnx.TensorProto.FLOAT16 in kinds


def first_overflow(model: Model, reference: Model, feeds: Feeds, *, provider: str = "cpu", threads: int | None = None,
                   most: int = 4) -> Overflow | None:
    """The first node of ``model`` in which numbers overflow that are finite in ``reference``; None where there is none.

    Looked at is the first feed on which an output is not finite, or else up to ``most`` feeds, and every value of the main
    graph, a few dozen a run. Where an output is not finite, the node is one that it was computed from, through values none
    of which is finite. Where the outputs are finite (a CPU computes float16 in float32 and rounds what is given out), it is
    the first node whose value does not fit its type. Masks that become −∞ and go no further do not count.

    Raises:
        InputError: ONNX Runtime fails.
    """
    graph = onnx.GraphProto()
    graph.CopyFrom(model.to_proto()[0].graph)
    sort_nodes(graph)
    outputs = [info.name for info in graph.output]
    names = [name for node in graph.node for name in node.output if name]
    known = {name for node in reference.to_proto()[0].graph.node for name in node.output}
    broken_feed = _broken_feed(model, feeds, provider, threads)
    numbers = list(range(0, len(feeds), max(1, len(feeds) // most)))[:most] if broken_feed is None else [broken_feed]
    chosen = {number: feeds[number] for number in numbers}
    for number, seen in _look(model, chosen, names, provider, threads).items():
        broken = [name for name in outputs if broken_feed is not None and seen.get(name, _NOTHING).nonfinite]
        suspects = _culprits(graph, seen, broken)
        shared = [name for _, name in suspects if name in known]
        there = _look(reference, {number: chosen[number]}, shared, provider, threads)[number]
        for node, name in suspects:
            if not there.get(name, _NOTHING).nonfinite:
                sizes = [seen[each].largest for each in node.input if each in seen]
                return Overflow(node.name, node.op_type, name, number, seen[name].nonfinite, max(sizes, default=None),
                                bool(broken))
    return None


def _broken_feed(model: Model, feeds: Feeds, provider: str, threads: int | None) -> int | None:
    """The first feed on which an output is not finite."""
    session = open_session(model, provider=provider, threads=threads, lean=True)
    floating = [spec.name for spec in session.outputs if spec.floating]
    return next((number for number, feed in enumerate(feeds)
                 if any(_seen(value).nonfinite for value in session.run(feed, floating).values())), None)


def _look(model: Model, feeds: Mapping[int, Feed], names: Sequence[str], provider: str,
          threads: int | None) -> dict[int, dict[str, _Seen]]:
    """Number of a feed → floating-point value → what was found in it."""
    found: dict[int, dict[str, _Seen]] = {number: {} for number in feeds}
    for start in range(0, len(names), _AT_ONCE):
        wanted = list(names[start:start + _AT_ONCE])
        session = open_session(model, provider=provider, threads=threads, outputs=wanted, only=True, lean=True)
        floating = [spec.name for spec in session.outputs if spec.floating]
        for number, feed in feeds.items():
            found[number] |= {name: _seen(value) for name, value in session.run(feed, floating).items()}
    return found


def _seen(value: Array) -> _Seen:
    wide = value.astype(np.float32) if value.dtype.itemsize < 4 else value
    finite = np.isfinite(wide)
    odd = wide[~finite]
    return _Seen(int(odd.size), bool((~np.isneginf(odd)).any()), float(np.abs(wide[finite]).max(initial=0)))


def _culprits(graph: onnx.GraphProto, seen: dict[str, _Seen], broken: Sequence[str]) -> list[tuple[onnx.NodeProto, str]]:
    """Nodes that make what is not finite out of what is, and their outputs: behind ``broken`` outputs, or anywhere."""
    behind = _behind(graph, seen, broken)
    found = []
    for node in graph.node:
        if any(name in seen and seen[name].nonfinite for name in reads(node)):
            continue
        for name in node.output:
            if name in seen and seen[name].nonfinite and (name in behind if broken else seen[name].harmful):
                found.append((node, name))
    return sorted(found, key=lambda each: not seen[each[1]].harmful)  # −∞ alone may be a mask


def _behind(graph: onnx.GraphProto, seen: dict[str, _Seen], broken: Sequence[str]) -> set[str]:
    """What is not finite, back from ``broken``."""
    maker = {name: node for node in graph.node for name in node.output if name}
    pending, found = list(broken), set(broken)
    while pending:
        node = maker.get(pending.pop())
        fresh = {name for name in (reads(node) if node is not None else ()) if name in seen and seen[name].nonfinite} - found
        found |= fresh
        pending += fresh
    return found
