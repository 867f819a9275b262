"""How wide each block should be, under one budget of parameters for all.

    minimize Σ_b s_b e_b(k_b)   subject to   Σ_b k_b p_b ≤ budget

e_b(k): part of the variance of the block's output that its best k neurons, refitted, leave unexplained (backward
elimination). s_b: what an error in this block does to the model's outputs, measured by slimming this block alone on feeds
that choose. p_b: parameters of a neuron. The sum is minimized by going down the convex hull of each curve, steepest gain first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

_STEPS = 16  # widths looked at in each block


@dataclass(frozen=True)
class Curve:
    """A block's widths to choose from, ascending, what is lost at each, and what a neuron costs."""

    widths: tuple[int, ...]
    losses: tuple[float, ...]
    parameters: int


def widths_to_try(d_ff: int, multiple: int) -> list[int]:
    """Widths from a sixteenth of ``d_ff`` to all of it, in steps of a ``multiple``."""
    step = max(1, round(d_ff / _STEPS / multiple)) * multiple
    return sorted({*(min(width, d_ff) for width in range(step, d_ff + step, step)), d_ff})


def allocate(curves: Sequence[Curve], budget: float) -> list[int]:
    """A width for each curve, all together within ``budget`` parameters (or the narrowest of each, if those exceed it)."""
    hulls = [_hull(curve) for curve in curves]
    place = [0] * len(curves)
    left = budget - sum(curve.widths[0] * curve.parameters for curve in curves)
    queue: list[tuple[float, int]] = []

    def offer(number: int) -> None:
        curve, hull, at = curves[number], hulls[number], place[number]
        if at + 1 < len(hull):
            cost = (curve.widths[hull[at + 1]] - curve.widths[hull[at]]) * curve.parameters
            heapq.heappush(queue, ((curve.losses[hull[at + 1]] - curve.losses[hull[at]]) / cost, number))

    for number in range(len(curves)):
        offer(number)
    while queue:
        _, number = heapq.heappop(queue)
        curve, hull, at = curves[number], hulls[number], place[number]
        cost = (curve.widths[hull[at + 1]] - curve.widths[hull[at]]) * curve.parameters
        if cost <= left:
            left -= cost
            place[number] += 1
            offer(number)
    return [curve.widths[hull[at]] for curve, hull, at in zip(curves, hulls, place, strict=True)]


def _hull(curve: Curve) -> list[int]:
    """Numbers of the widths on the lower convex hull of the curve, ascending."""
    hull: list[int] = []
    for number, (width, loss) in enumerate(zip(curve.widths, curve.losses, strict=True)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (curve.losses[b] - curve.losses[a]) * (width - curve.widths[a]) >= (loss - curve.losses[a]) * (
                    curve.widths[b] - curve.widths[a]):
                hull.pop()
            else:
                break
        hull.append(number)
    return hull
