"""Limits as numbers that add up over blocks.

A choice is made by adding what each block does to the outputs by itself. Errors of different blocks are nearly uncorrelated, so
what adds is their energy: for a metric m of an output

    cosine, top-1, top-5   1 − m              (1 − cos α ≈ α²/2)
    relative and absolute errors   m²
    SQNR                   10^(−m/10)         (noise over signal)
    KL, score              m                  (KL is of second order in the error)
    perplexity             ln m               (m: the candidate's over the reference's; nats per token)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..graph.errors import InputError
from ..runtime.limits import LOGITS_METRICS, Limit, parse_limit

OWN = ("perplexity", "score")
"""Metrics that only a search knows; they are of the whole model."""
WHOLE = "model"
"""The name under which these stand among the outputs."""
Drifts = Mapping[str, Mapping[str, float | None]]
"""Output → metric → number."""


@dataclass(frozen=True)
class Row:
    """A metric of an output that has a limit, or that is to be small.

    Attributes:
        limit: how large its damage may be; None: no limit.
    """

    metric: str
    output: str
    limit: float | None = None

    def damage(self, drift: Drifts) -> float:
        """The damage in ``drift``; infinite where it is not a number."""
        value = drift.get(self.output, {}).get(self.metric)
        return math.inf if value is None or not math.isfinite(value) else damage(self.metric, value)


def parse_goal(text: str) -> Limit:
    """A limit on the drift, also on ``perplexity`` and ``score``.

    Raises:
        InputError: it is not written like that, or there is no such metric.
    """
    name, _, number = text.partition("=")
    if name.strip() in OWN:
        stand_in = parse_limit(f"max_abs={number}")
        return Limit(name.strip(), stand_in.value)
    return parse_limit(text)


def damage(metric: str, value: float) -> float:
    """A value of ``metric`` as a number that is 0 for no drift and adds up."""
    if metric.startswith("cosine") or metric in ("top1", "top5"):
        return max(0.0, 1.0 - value)
    if metric == "sqnr_db":
        return 10.0 ** (-value / 10)
    if metric == "perplexity":
        return max(0.0, math.log(value)) if value > 0 else math.inf
    if metric in ("kl_mean", "score", "nonfinite"):
        return max(0.0, value)
    return value * value


def rows_of(limits: Sequence[Limit], outputs: Sequence[str], logits: set[str]) -> list[Row]:
    """Every limit with every output it is for; without limits what is to be small.

    Raises:
        InputError: a limit names an output that is not there, or logits where there are none.
    """
    rows = []
    for limit in limits:
        if limit.metric in OWN:
            rows.append(Row(limit.metric, WHOLE, damage(limit.metric, limit.value)))
            continue
        if limit.output is not None and limit.output not in outputs:
            raise InputError(f"limit on {limit.metric}: no output '{limit.output}': choose from {', '.join(outputs)}")
        over = list(outputs) if limit.output is None else [limit.output]
        if limit.metric in LOGITS_METRICS:
            over = [name for name in over if name in logits]
        if not over:
            raise InputError(f"limit on {limit.metric}: it is for outputs that are logits: name one, "
                             f"{limit.metric}@OUTPUT={limit.value:g}")
        rows += [Row(limit.metric, name, damage(limit.metric, limit.value)) for name in over]
    if rows:
        return rows
    return [Row("kl_mean" if name in logits else "cosine_mean", name) for name in outputs]
