"""What rewriting one block does to the outputs of the model, on feeds that choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...graph.block import FFNBlock
from ...graph.ffn import find_ffn_blocks
from ...graph.model import Model
from ...runtime import Feeds, compare, open_session
from ...runtime.metrics import Metrics
from ...runtime.padding import Padding, rows_of
from ..base import Context, Refused
from .bypass import bypass

FEEDS = 4
"""How many of the feeds that choose are looked at."""
_LARGEST = 1e30  # that infinite damage is taken for where damages are added up and compared


def damage(model: Model, block: FFNBlock, rewrite: Callable[[Model, FFNBlock], Any], context: Context) -> float | None:
    """What rewriting this one block does to the model's outputs: mean KL divergence of logits, else ‖o' − o‖² / ‖o‖².

    Returns:
        The mean over the outputs, infinite where one of them is no number any more. None where the feeds never run the block,
        so that they cannot tell.
    """
    assert context.choose is not None
    feeds = context.choose[:FEEDS]
    trial = model.copy()
    rewrite(trial, _same(trial, block))
    moved = output_damage(_moved(model, trial, feeds, context))
    return None if moved == 0 and not runs(model, block, feeds, context) else moved


def output_damage(outputs: Mapping[str, Metrics]) -> float:
    """The mean over the outputs; infinite where nothing was compared, or where a metric is no finite number."""
    found = []
    for metrics in outputs.values():
        kl, relative = metrics.get("kl_mean"), metrics.get("rel_l2")
        found.append(kl if kl is not None else math.inf if relative is None else relative * relative)
    mean = float(np.mean(found)) if found else math.inf
    return mean if math.isfinite(mean) else math.inf


def per_error(moved: float, error: float) -> float:
    """Damage to the outputs for each unit of a block's own error, finite also where the damage is not."""
    return min(moved, _LARGEST) / max(error, 1 / _LARGEST)


def runs(model: Model, block: FFNBlock, feeds: Feeds, context: Context) -> bool:
    """Whether anything in the outputs comes from ``block`` on ``feeds``: whether they change where it gives NaN.

    It does not in a branch that is not taken, and in an expert that no token reaches.
    """
    trial = model.copy()
    bypass(trial, _same(trial, block), np.full(block.d_out, np.nan))
    return any(metrics["max_abs"] != 0 for metrics in _moved(model, trial, feeds, context).values())


def why_blind(model: Model, feeds: Feeds, context: Context) -> Refused | None:
    """Why ``feeds`` cannot tell what a rewrite does to the outputs of ``model``; None where they can."""
    session = open_session(model, provider=context.provider, threads=context.threads)
    names = [spec.name for spec in session.outputs if spec.is_tensor and spec.dtype.kind not in "Oc"]
    compared = 0
    for feed in feeds:
        padding = Padding(feed)
        for name, value in session.run(feed, names).items():
            rows = rows_of(np.asarray(value), padding)
            compared += rows.size
            if not np.isfinite(rows.astype(np.float32)).all():
                return Refused("the model itself gives numbers that are not finite on the feeds that choose", name)
    return None if compared else Refused("the feeds that choose have nothing in them to compare (is all of it padding?)",
                                         names[0] if names else "")


def _same(trial: Model, block: FFNBlock) -> FFNBlock:
    """``block`` in a copy of its model."""
    return next(other for other in find_ffn_blocks(trial) if other.output.name == block.output.name and other.path == block.path)


def _moved(model: Model, trial: Model, feeds: Feeds, context: Context) -> Mapping[str, Metrics]:
    return compare(model, trial, feeds, provider=context.provider, threads=context.threads, allow_cpu=True).outputs
