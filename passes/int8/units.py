"""Which linears are quantized together, and what that means for the blocks they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ...graph.block import FFNBlock
from ..base import Refused
from ..blocks import Blocks
from .linear_groups import LinearGroup, is_plain, merged


@dataclass(eq=False)
class Unit:
    """Groups that are quantized together or not at all: those of an FFN block, or linears that read one value.

    Attributes:
        blocks: indices of the blocks that have a linear in it; empty for other linears.
        groups: in order of execution.
        smoothed: what the weights of a group now hold besides the numbers of the file; set by ``smooth_units``.
    """

    blocks: tuple[int, ...]
    groups: list[LinearGroup]
    smoothed: list[str] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether all its linears are single matrices over the last axis."""
        return all(is_plain(group) for group in self.groups)

    def refused(self, reason: str) -> list[Refused]:
        """Each of its blocks (or the linears) left alone because of ``reason``."""
        value = self.groups[-1].linears[-1].output.name
        return [Refused(reason, value, index) for index in self.blocks] or [Refused(reason, value)]


def units_of(groups: Iterable[LinearGroup], blocks: Mapping[int, FFNBlock]) -> list[Unit]:
    """The units that ``groups`` make up, in order of execution.

    What a block reads alone goes with its down projection; what several read goes with the first of them.
    """
    index_of = {id(block): index for index, block in blocks.items()}
    readers: dict[tuple[int, int], list[int]] = {}
    for index, block in blocks.items():
        for linear in block.linears():
            readers.setdefault((id(block.graph), id(linear.input)), []).append(index)
    units: dict[object, Unit] = {}
    for group in merged(groups):
        value = (id(group.graph), id(group.input))
        unit = units.setdefault(value if group.block is None else index_of[id(group.block)], Unit((), []))
        unit.groups.append(group)
        unit.blocks = tuple(sorted({*unit.blocks, *readers.get(value, [])}))
    return list(units.values())


def tied(blocks: Mapping[int, FFNBlock], others: Mapping[int, FFNBlock]) -> dict[int, int]:
    """Those of ``blocks`` that run a projection of one of ``others`` too → that one: what is done to one is done to both."""
    owner = {id(linear.node): index for index, block in others.items() for linear in block.linears()}
    found: dict[int, int] = {}
    waiting = dict(blocks)
    while True:
        new = {index: owner[id(linear.node)] for index, block in waiting.items() for linear in block.linears()
               if id(linear.node) in owner}
        if not new:
            return found
        found.update(new)
        owner.update({id(linear.node): index for index in new for linear in waiting.pop(index).linears()})


def doubled(blocks: Mapping[int, FFNBlock], others: Mapping[int, FFNBlock]) -> list[str]:
    """A sentence where weights of ``blocks``, which are now integers, stay in the file as floats because ``others`` read them."""
    quantized = {id(linear.source) for block in blocks.values() for linear in block.linears() if linear.source is not None}
    float_too = [index for index, block in others.items() if any(id(linear.source) in quantized for linear in block.linears())]
    if not float_too:
        return []
    which = f"block {float_too[0]} stays in float and shares" if len(float_too) == 1 else (
        f"blocks {Blocks(tuple(float_too))} stay in float and share")
    return [f"{which} weights with blocks that do not: the file holds these weights twice"]
