"""Why something is not an FFN block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Where a walk through the graph gave up, and why.

    Attributes:
        value: the value at which it did.
        reason: one clause, for people.
        linear_leaves: how many linears it had reached by then.
    """

    value: str
    reason: str
    linear_leaves: int = 0


@dataclass(frozen=True)
class Rejection:
    """What looks like an FFN block and is not: the output of its second linear, and the reason."""

    value: str
    reason: str
