"""Which blocks matter least, by a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock
from ...graph.errors import InputError
from ...graph.ffn import find_ffn_blocks
from ...graph.model import Model
from ...runtime import compare
from ..base import Context
from .bypass import bypass, is_pure_branch
from .damage import runs
from .measure import rows, unmeasurable

Array = npt.NDArray[Any]


def score_blocks(model: Model, blocks: dict[int, FFNBlock], by: str, context: Context) -> dict[int, float]:
    """Index → score; infinite where there is none.

    Args:
        by: ``cosine`` or ``output``; see :func:`influence` and :func:`removal_error`.
    """
    scores: dict[int, float] = {}
    for index, block in blocks.items():
        context.progress(f"scoring block {index}")
        scores[index] = influence(model, block, context) if by == "cosine" else removal_error(model, block, context)
    return scores


def lowest(scores: Mapping[int, float], count: int) -> tuple[list[int], list[int]]:
    """The ``count`` indices with the lowest scores, in the order of ``scores``, and those of them that have none to be chosen by.

    Where all are to be chosen, none needs a score.
    """
    chosen = sorted(scores, key=lambda index: (scores[index], index))[:count]
    found = [index for index in scores if index in chosen]
    return found, [index for index in found if len(found) < len(scores) and not np.isfinite(scores[index])]


def output_error(model: Model, take_out: Callable[[Model], bool], context: Context) -> float:
    """The mean over the model's outputs of ‖o' − o‖/‖o‖ after ``take_out``, which says whether it did anything.

    Infinite where it did not, and where an output is no number any more.
    """
    if context.choose is None:
        raise InputError("choosing by the output needs real inputs: give them with --data")
    trial = model.copy()
    if not take_out(trial):
        return float("inf")
    drift = compare(model, trial, context.choose, provider=context.provider, threads=context.threads, allow_cpu=True)
    found = [metrics["rel_l2"] for metrics in drift.outputs.values()]
    errors = [np.inf if each is None else each for each in found]
    return float(np.nan_to_num(np.mean(errors), nan=np.inf, posinf=np.inf)) if errors else float("inf")


class Cosine:
    """1 − E[cos(before, after)] of rows that stream by; rows with a number that is not finite do not count."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def update(self, before: Array, after: Array) -> None:
        """Add rows ``[rows, features]`` of both."""
        good = np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1)
        before, after = before[good], after[good]
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        self._total += float(((before * after).sum(axis=1) / np.maximum(norms, 1e-30)).sum())
        self._count += len(before)

    @property
    def distance(self) -> float:
        """Infinite where nothing was seen."""
        return 1 - self._total / self._count if self._count else float("inf")


def influence(model: Model, block: FFNBlock, context: Context) -> float:
    """Block influence 1 − E[cos(r, r + f)], r the residual stream; infinite where it cannot be measured.

    Source: ShortGPT, arXiv 2403.03853; for single sublayers arXiv 2406.15786.
    """
    if unmeasurable(model, block) is not None or not is_pure_branch(block) or context.choose is None:
        return float("inf")
    cosine = Cosine()
    axis = block.axis
    for residual, branch in rows(model, [block.join.residual, block.join.branch], [axis, axis], context.choose, context):
        if residual.shape != branch.shape:
            return float("inf")
        before = residual.astype(np.float64)
        cosine.update(before, before + branch)
    return cosine.distance


def removal_error(model: Model, block: FFNBlock, context: Context) -> float:
    """The error of the outputs when this one block is removed; infinite where the feeds that choose never run it."""

    def take_out(trial: Model) -> bool:
        same = next((other for other in find_ffn_blocks(trial) if other.output.name == block.output.name
                     and other.path == block.path), None)
        if same is not None:
            bypass(trial, same, None)
        return same is not None

    error = output_error(model, take_out, context)
    assert context.choose is not None
    return error if error or runs(model, block, context.choose, context) else float("inf")
