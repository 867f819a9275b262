"""Limits on drift: ``METRIC[@OUTPUT]=VALUE``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..graph.errors import InputError

LOWER = frozenset({"cosine_mean", "cosine_p5", "cosine_min", "sqnr_db", "top1", "top5"})
"""Metrics that are good when they are large."""
METRICS = ("max_abs", "mean_abs", "rel_l2", "sqnr_db", "cosine_mean", "cosine_p5", "cosine_min", "kl_mean", "top1", "top5",
           "nonfinite")
LOGITS_METRICS = ("kl_mean", "top1", "top5")
"""Metrics of outputs that are logits only."""


@dataclass(frozen=True)
class Limit:
    """A bound that a metric must keep.

    Attributes:
        metric: one of ``METRICS``.
        value: the least it may be for ``LOWER`` metrics, the most for others.
        output: the output it is for; None: every floating-point output.
    """

    metric: str
    value: float
    output: str | None = None

    def met(self, measured: float | None) -> bool:
        """Whether ``measured`` keeps it. What is not a number (NaN, None) does not."""
        if measured is None or math.isnan(measured):
            return False
        return measured >= self.value if self.metric in LOWER else measured <= self.value


def parse_limit(text: str) -> Limit:
    """``METRIC=VALUE`` or ``METRIC@OUTPUT=VALUE`` as a limit.

    Raises:
        InputError: it is not written like that, or there is no such metric.
    """
    found = re.fullmatch(r"([^@=]+)(?:@(.+))?=([^=]+)", text, re.DOTALL)
    if found is None:
        raise InputError(f"limit '{text}': write it like cosine_mean=0.99 or cosine_mean@OUTPUT=0.99")
    metric, output, number = found.groups()
    if metric.strip() not in METRICS:
        raise InputError(f"limit '{text}': no metric '{metric}': choose from {', '.join(METRICS)}")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"limit '{text}': '{number}' is not a number: write it like cosine_mean=0.99")
    return Limit(metric.strip(), value, output)
