"""Where the FFN blocks of a model lie in another one that was made from it: the values at their edges, found by name.

    residual ──┬──────────────────────► Add ──► exit
               └──► norm ──► block ──────┘

Rewrites keep the names of the values that they compute, so what lies between the residual and the exit is the block in both
models, however it is written. A block that was taken out has no exit left: what its readers read now stands in its place.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx

from ...graph.block import FFNBlock
from ...graph.check import sort_nodes
from ...graph.edit import is_output
from ...graph.ffn import find_ffn_blocks
from ...graph.model import Model


@dataclass(frozen=True)
class Span:
    """A block between values of the main graph.

    Attributes:
        index, name: of the block, in the reference.
        residual: the operand that its output is added to.
        exits: what the residual Add gives; more than one value where it is a SkipLayerNormalization.
        given: computed values that the block may read and that are not its own: the residual, the stream before it, what is
            added beside it (attention, other experts).
    """

    index: int
    name: str
    residual: str
    exits: tuple[str, ...]
    given: tuple[str, ...]


@dataclass(frozen=True)
class Spans:
    """The blocks of a model in another one.

    Attributes:
        spans: blocks in order of execution.
        candidate: the other model, the exits of blocks that were taken out put back by name.
        left_out: block → why it is not among them.
        names: block → its name, all of them.
    """

    spans: list[Span]
    candidate: Model
    left_out: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)


def find_spans(reference: Model, candidate: Model) -> Spans:
    """Every block of ``reference`` between values that ``candidate`` has too."""
    blocks = list(find_ffn_blocks(reference))
    main = {id(node) for node in reference.graph.nodes}
    left_out = {block.index: f"it is inside the subgraph {block.path}, where ONNX Runtime gives no values out"
                for block in blocks if block.path != "main" or id(block.join.node) not in main}
    candidates = _spans(reference, [block for block in blocks if block.index not in left_out])
    restored, there = _restored(reference, candidate, candidates)
    spans = []
    for span in candidates:
        missing = [name for name in span.exits if name not in there]
        if missing:
            left_out[span.index] = f"the candidate has no value '{missing[0]}', and nothing that is read in its place"
            continue
        spans.append(Span(span.index, span.name, span.residual, span.exits, tuple(n for n in span.given if n in there)))
    return Spans(spans, restored, dict(sorted(left_out.items())), {block.index: block.name for block in blocks})


def _spans(reference: Model, blocks: list[FFNBlock]) -> list[Span]:
    computed = {tensor.name for node in reference.graph.nodes for tensor in node.outputs if tensor.name}
    exits = {block.index: tuple(tensor.name for tensor in block.join.node.outputs if tensor.name
                                and (tensor.outputs or is_output(reference.graph, tensor))) for block in blocks}
    spans: list[Span] = []
    stream: list[str] = []
    for block in blocks:
        own = exits[block.index]
        beside = [other.output.name for other in blocks if other is not block and exits[other.index] == own]
        given = [block.join.residual.name, *(tensor.name for tensor in block.join.others), *beside, *reversed(stream)]
        kept = [name for name in dict.fromkeys(given) if name in computed and name not in own]
        spans.append(Span(block.index, block.name, block.join.residual.name, own, tuple(kept)))
        stream += [block.join.residual.name, *own]
    return spans


def _restored(reference: Model, candidate: Model, spans: list[Span]) -> tuple[Model, set[str]]:
    """``candidate`` with the missing exits put back where it is known what stands for them, and all values it computes."""
    before, after = reference.to_proto()[0], onnx.ModelProto()
    found, values = candidate.to_proto()
    after.CopyFrom(found)
    there = {name for node in after.graph.node for name in node.output if name}
    outside = {info.name for info in after.graph.input} | {tensor.name for tensor in after.graph.initializer}
    readers = _Readers(before.graph, after.graph)
    sources = _sources(spans, there | outside, readers)
    for name, (source, read_now) in sources.items():
        after.graph.node.add(op_type="Identity", name=f"{name}/restored", input=[source], output=[name])
        for node, index in readers.of(name):
            if node.input[index] == read_now:
                node.input[index] = name
    if not sources:
        return candidate, there
    sort_nodes(after.graph)
    return Model(after, values, candidate.path, candidate.external), there | set(sources)


def _sources(spans: list[Span], known: set[str], readers: _Readers) -> dict[str, tuple[str, str]]:
    """Missing exit → the value to make it from, and what its readers read in the candidate now.

    An exit whose readers are all gone too (two blocks taken out, one behind the other) is the residual of its block, if the
    readers of a later exit confirm that nothing lies between.
    """
    missing = {name: span.residual for span in spans for name in span.exits if name not in known}
    votes = {name: readers.vote(name) for name in missing}
    found: dict[str, tuple[str, str]] = {}

    def resolved(name: str) -> str:
        return found[name][1] if name in found else name

    for name in missing:  # in order of execution
        vote = votes[name]
        if vote is None:
            continue
        chain = [missing[name]]
        while chain[-1] in missing and chain[-1] not in found and votes[chain[-1]] is None:
            chain.append(missing[chain[-1]])
        if resolved(chain[-1]) == vote and (vote in known):
            for exit_name, residual in zip(reversed(chain[:-1]), reversed(chain[1:]), strict=True):
                found[exit_name] = (residual, vote)
            found[name] = (chain[0], vote)
        elif vote in known:
            found[name] = (vote, vote)
    return found


class _Readers:
    """The nodes of a graph that read a value, looked up in another graph by what they compute."""

    def __init__(self, before: onnx.GraphProto, after: onnx.GraphProto) -> None:
        maker = {name: node for node in after.node for name in node.output if name}
        self._of: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self._copies = {node.input[0]: node.output[0] for node in before.node
                        if node.op_type == "Identity" and node.output[0] in maker}
        for node in before.node:
            same = next((maker[name] for name in node.output if name in maker), None)
            if same is None or same.op_type != node.op_type or len(same.input) != len(node.input):
                continue
            for index, name in enumerate(node.input):
                self._of.setdefault(name, []).append((same, index))

    def of(self, name: str) -> list[tuple[onnx.NodeProto, int]]:
        """Nodes of the other graph, and which of their inputs was ``name`` in the first."""
        return self._of.get(name, [])

    def vote(self, name: str) -> str | None:
        """What most of them read in its place, or what was an Identity of it (the name of an output stays, not its source)."""
        counts = Counter(node.input[index] for node, index in self.of(name))
        return counts.most_common(1)[0][0] if counts else self._copies.get(name)
