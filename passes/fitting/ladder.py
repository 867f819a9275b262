"""For each block the cheapest stand-in that moves the model's outputs little enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...graph.block import FFNBlock
from ...graph.model import Model
from ..base import Context, Refused
from .damage import damage
from .stand_in import Measured, Rung, StandIn


@dataclasses.dataclass(frozen=True)
class Step:
    """The rung that was taken, what it does to the outputs, and what the cheaper ones would have done."""

    stand_in: StandIn
    damage: float
    tried: str


def climb(measured: Measured, rungs: Sequence[Rung], within: float, name: str) -> Step | Refused:
    """Try ``rungs`` in turn on a copy of the model, up to the first whose damage to the outputs is at most ``within``.

    Returns:
        That one, or a refusal that says what each of them did, or why there was none to try. Refused as well where the feeds
        that choose never run the block, which would let everything through.
    """
    block, context = measured.block, measured.context
    found: list[str] = []
    for rung in rungs:
        context.progress(f"{name}: block {block.index}, trying {rung}")
        stand_in = measured.stand_in(rung)
        if isinstance(stand_in, Refused):
            found.append(f"{rung}: {stand_in.reason}")
            continue
        moved = harm(measured.model, block, stand_in, context)
        if moved is None:
            return Refused("no token of the feeds that choose reached it", block.output.name)
        if moved <= within:
            return Step(stand_in, moved, ", ".join(found))
        found.append(f"{rung} {moved:.3g}")
    return Refused(f"nothing keeps the outputs within {within:g} ({', '.join(found)})", block.output.name)


def harm(model: Model, block: FFNBlock, stand_in: StandIn, context: Context) -> float | None:
    """What ``stand_in`` does to the outputs of the model as it is now, on feeds that choose (see :func:`damage`)."""
    alone = dataclasses.replace(context, streams=None)
    return damage(model, block, lambda trial, same: stand_in.put(trial, same, alone), context)
