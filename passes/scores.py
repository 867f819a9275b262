"""Which blocks matter least, by a measurement."""

from __future__ import annotations

import numpy as np

from ..graph.errors import InputError
from ..graph.ffn import FFNBlock, find_ffn_blocks
from ..graph.model import Model
from ..runtime import compare
from .base import Context
from .bypass import bypass, is_pure_branch
from .measure import rows, unmeasurable


def choose_blocks(model: Model, blocks: dict[int, FFNBlock], count: int, by: str, context: Context) -> list[int]:
    """The ``count`` blocks with the lowest score, in order of execution.

    Args:
        by: ``cosine`` or ``output``; see :func:`influence` and :func:`output_error`.
    """
    scores: dict[int, float] = {}
    for index, block in blocks.items():
        context.progress(f"scoring block {index}")
        scores[index] = influence(model, block, context) if by == "cosine" else output_error(model, block, context)
    lowest = sorted(scores, key=lambda index: (scores[index], index))[:count]
    return [index for index in blocks if index in lowest]


def influence(model: Model, block: FFNBlock, context: Context) -> float:
    """Block influence 1 − E[cos(r, r + f)], r the residual stream; infinite where it cannot be measured.

    Source: ShortGPT, arXiv 2403.03853; for single sublayers arXiv 2406.15786.
    """
    if unmeasurable(model, block) is not None or not is_pure_branch(block) or context.choose is None:
        return float("inf")
    total, count = 0.0, 0
    axis = block.axis
    for residual, branch in rows(model, [block.join.residual, block.join.branch], [axis, axis], context.choose, context):
        if residual.shape != branch.shape:
            return float("inf")
        before = residual.astype(np.float64)
        after = before + branch
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        total += float(((before * after).sum(axis=1) / np.maximum(norms, 1e-30)).sum())
        count += len(before)
    return 1 - total / count if count else float("inf")


def output_error(model: Model, block: FFNBlock, context: Context) -> float:
    """The mean over the model's floating-point outputs of ‖o' − o‖/‖o‖ when this one block is removed."""
    if context.choose is None:
        raise InputError("choosing blocks by the output needs real inputs: give them with --data")
    trial = model.copy()
    same = next((other for other in find_ffn_blocks(trial) if other.output.name == block.output.name
                 and other.path == block.path), None)
    if same is None:
        return float("inf")
    bypass(trial, same, None)
    drift = compare(model, trial, context.choose, provider=context.provider, threads=context.threads, allow_cpu=True)
    errors = [metrics["rel_l2"] for metrics in drift.to_json()["outputs"].values() if metrics.get("rel_l2") is not None]
    return float(np.mean(errors)) if errors else float("inf")
