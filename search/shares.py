"""What a form does to each block, where it was measured in several blocks together: parts that add up to what was measured.

    bytes    b_u = B n_u / Σ n        n: numbers in the block's weights
    damage   d_u = D r_u / Σ r        r: the damage where the block is left out, if known of all of them; else 1

Rounding adds an error to what a block gives that is a part of it, however wide the block is, and so does as much as the block
itself does to the outputs, and not as much as its weights count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..graph.block import FFNBlock
from .candidates import Candidate
from .goal import Row
from .scoring import Scored

Known = Mapping[tuple[int, Candidate], Scored]
"""Unit and form → what was measured, and the ``units`` that it was measured in together, where they are several."""
Sizes = dict[tuple[int, Candidate], float]
_GONE = Candidate(removed=True)


def bytes_of(known: Known, blocks: Mapping[int, FFNBlock]) -> Sizes:
    """The bytes that each form adds."""
    def numbers(unit: int) -> float:
        return sum(linear.experts * linear.d_in * linear.d_out for linear in blocks[unit].linears())

    return _shared(known, lambda found: float(found["bytes"]), lambda units: {unit: numbers(unit) for unit in units})


def damages_of(known: Known, row: Row) -> Sizes:
    """The damage that each form does, as ``row`` counts it."""
    def gone(units: Sequence[int]) -> dict[int, float]:
        found = {unit: row.damage(known[unit, _GONE]["drift"]) if (unit, _GONE) in known else math.inf for unit in units}
        return found if all(0 < each < math.inf for each in found.values()) else dict.fromkeys(units, 1.0)

    return _shared(known, lambda found: row.damage(found["drift"]), gone)


def _shared(known: Known, size: Callable[[Scored], float], weights: Callable[[Sequence[int]], dict[int, float]]) -> Sizes:
    found = {}
    for (unit, each), scored in known.items():
        parts = weights(scored["units"]) if "units" in scored else {unit: 1.0}
        found[unit, each] = size(scored) * parts[unit] / sum(parts.values())
    return found
