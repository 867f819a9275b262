"""Whether a block with fewer neurons is less work, and what the file has to say to that.

    multiply-adds of a token:   Σ d_in d_out   →   k (n d_model + d_out) + d_model d_out + what stays

k neurons stay, n the projections that each of them has; the middle term is the affine map's, where there is one. A projection
stays whose result something else reads, too. A weight that something else reads stays in the file, though this block multiplies
by it no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.edit import consumers, is_output, producer
from ...graph.linear import Linear
from ...graph.model import Model
from ..blocks import Blocks
from ..exact.sharing import is_free

_NAMED = 3  # reasons that a note names


def why_no_less(block: FFNBlock, width: int, affine: bool) -> str | None:
    """Why ``block`` with ``width`` of its neurons, and an ``affine`` map beside them or none, is no less work; else None."""
    shown = shown_inside(block)
    work = width * (len(block.region.leaves) * block.d_model + block.d_out) + affine * block.d_model * block.d_out
    work += sum(linear.d_in * linear.d_out for linear in _staying(block, shown))
    before = block.macs_per_token
    if work < before:
        return None
    if width >= block.d_ff:
        return f"all of its {block.d_ff} neurons would stay" + (", and an affine map would come beside them" if affine else "")
    parts = [f"{width} of its {block.d_ff} neurons", *(["an affine map"] if affine else []),
             *([f"what computes '{shown[0].name}', which something else reads,"] if shown else [])]
    return f"{' and '.join(parts)} would be {work} multiply-adds a token, no fewer than the {before} that it has"


def _inside(block: FFNBlock) -> list[gs.Node]:
    nodes = [*block.nodes, *block.region.nodes, *(node for linear in block.linears() for node in linear.nodes)]
    return list({id(node): node for node in nodes}.values())


def shown_inside(block: FFNBlock) -> list[gs.Tensor]:
    """The values inside ``block`` that something else reads, or that are outputs."""
    inside = _inside(block)
    own = {id(node) for node in inside}
    return [tensor for node in inside for tensor in node.outputs if tensor.name and tensor is not block.output
            and (is_output(block.graph, tensor) or any(id(reader) not in own for reader in consumers(tensor)))]


def _staying(block: FFNBlock, shown: Iterable[gs.Tensor]) -> list[Linear]:
    """The linears of ``block`` that the values ``shown`` need."""
    own = {id(node) for node in _inside(block)}
    pending, reached = list(shown), set[int]()
    while pending:
        node = producer(pending.pop())
        if node is not None and id(node) in own and id(node) not in reached:
            reached.add(id(node))
            pending += node.inputs
    return [linear for linear in block.linears() if id(linear.node) in reached]


class Weights:
    """The weights of a model and of blocks in it, before some of those blocks are made narrower."""

    def __init__(self, model: Model, blocks: Mapping[int, FFNBlock]) -> None:
        self._model = model
        self._bytes = _stored(model)
        self._sources = {index: {id(linear.source): linear.source for linear in block.linears() if linear.source is not None}
                         for index, block in blocks.items()}

    def why_grown(self, narrowed: Iterable[int]) -> str | None:
        """Why all weights together take more bytes than before, though the blocks ``narrowed`` are less work; else None."""
        grown = _stored(self._model) - self._bytes
        if grown <= 0:
            return None
        of_block = {index: self._sources[index] for index in narrowed}
        sources = {key: source for own in of_block.values() for key, source in own.items()}
        several = [index for index, own in of_block.items()
                   if any(key in other for at, other in of_block.items() if at != index for key in own)]
        why = [f"blocks {Blocks(tuple(several))} had weights in common and have their own now"] if several else []
        why += [f"'{source.name}' is still read by {reader}" for source in sources.values() for reader in _readers(source)[:1]]
        more = [f"and {len(why) - _NAMED} more"] if len(why) > _NAMED else []
        return f"less is multiplied, but the weights take {grown} bytes more: " + ", ".join([*why[:_NAMED], *more])


def _stored(model: Model) -> int:
    read = [tensor for _, graph in model.graphs()
            for tensor in (*(each for node in graph.nodes for each in node.inputs), *graph.outputs)]
    return sum({id(tensor): int(tensor._values.nbytes) for tensor in read if isinstance(tensor, gs.Constant)}.values())


def _readers(source: gs.Constant) -> list[str]:
    """What still reads ``source``."""
    found = [f"'{node.name or node.outputs[0].name}'" for node in consumers(source)]
    return found if is_free(source) else ["whoever reads the outputs", *found]
