"""How many neurons stay in single blocks, as one word of a plan: ``384@0+2/0@5/1344bare@3``."""

from __future__ import annotations

from typing import NamedTuple

from ...graph.errors import InputError
from ..blocks import Blocks

_BARE = "bare"


class Width(NamedTuple):
    """Of one block.

    Attributes:
        neurons: how many stay.
        bare: no affine map of the input stands beside them, whatever the other blocks get.
    """

    neurons: int
    bare: bool = False

    def __str__(self) -> str:
        return f"{self.neurons}{_BARE if self.bare else ''}"


def parse_widths(text: str) -> dict[int, Width]:
    """Block → its width.

    Raises:
        ValueError: it is not written like ``384@0+2/0@5/1344bare@3``, or gives a block two widths.
    """
    found: dict[int, Width] = {}
    for part in text.split("/") if text else []:
        width, _, blocks = part.partition("@")
        neurons = width.removesuffix(_BARE)
        try:
            indices = Blocks.parse(blocks).indices
        except InputError:
            indices = None
        if not neurons.isdecimal() or not indices:
            raise ValueError(f"widths={text}: write it like 384@0+2/0@5/96bare@1, neurons at blocks")
        if not int(neurons) and neurons != width:
            raise ValueError(f"widths={text}: {width} would leave neither neurons nor an affine map")
        twice = [index for index in indices if index in found]
        if twice:
            raise ValueError(f"widths={text}: block {twice[0]} has two widths: give it one")
        found.update(dict.fromkeys(indices, Width(int(neurons), neurons != width)))
    return found
