"""A rewrite tried on feeds before it is done: whether the outputs stay what they were."""

from __future__ import annotations

from ...graph.model import Model
from ...runtime import Feeds, Session, compare
from ..base import Context, Refused


def why_not_same(before: Model | Session, after: Model | Session, feeds: Feeds, bound: float, reason: str,
                 context: Context) -> Refused | None:
    """The first output whose relative error, rows of padding left out, is above ``bound``, and ``reason``; None where none is.

    Raises:
        InputError: ONNX Runtime fails at one of the two.
    """
    drift = compare(before, after, feeds, provider=context.provider, threads=context.threads, allow_cpu=True, lean=True)
    if not drift.outputs:
        return Refused("there is no output that would show whether it is the same")
    for name, metrics in drift.outputs.items():
        error = metrics["rel_l2"]
        if error is None or not error <= bound:
            return Refused(reason if error is None else f"{reason} (relative error {error:.2g})", name)
    return None
