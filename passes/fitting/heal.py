"""Blocks that stay make good what the blocks rewritten before them did wrong.

    y = h V + b   →   y = h V' + b',    V' = argmin Σ_t w_t ‖t_t − h_t V' − b'‖² + λ Σ_i var(h_i) ‖V'_i − V_i‖²

h are all the neurons of a block that nothing else is done to, t what brings the residual stream back to where the original model
has it (``target=stream`` in :mod:`evidence`). Shapes and work stay what they are: only the numbers of the down projection change,
and those only where tokens that are held out say that it helps.

Source: docs/approximations.md; the least squares of STAT, arXiv 2406.00061, with no neuron left out.
"""

from __future__ import annotations

import numpy as np

from ...graph.block import FFNBlock
from ...graph.builder import Builder
from ...graph.edit import producer, remove_dead, take_over
from ...graph.model import Model
from ...graph.narrow import why_not_narrow
from ..base import Context
from ..blocks import Blocks
from ..exact.sharing import is_shared
from .bypass import is_pure_branch
from .evidence import Evidence
from .measure import unmeasurable
from .neuron_fit import Features, NeuronFit, choose_ridge, refit

_WORTH = 0.99  # of the error as it is, which tokens held out must have less than


class Healer:
    """Goes along with a pass that rewrites blocks in order of execution, and heals those between and behind them.

    Args:
        context: with ``streams``, which the pass goes through too.
        chosen: the blocks that the pass rewrites, or would.
        weight: how tokens are weighted.
    """

    def __init__(self, model: Model, context: Context, chosen: Blocks, weight: str) -> None:
        self._model, self._context, self._weight = model, context, weight
        there = context.ledger.blocks
        self._order = {index: place for place, index in enumerate(there)}
        self._waiting = [(index, block) for index, block in there.items() if index not in chosen]
        self.began = False
        self.healed: list[int] = []

    def before(self, index: int) -> None:
        """Heal what runs before block ``index``, which comes next."""
        while self._waiting and self._order[self._waiting[0][0]] < self._order[index]:
            self._heal(*self._waiting.pop(0))

    def rest(self) -> None:
        """Heal what runs behind all of them."""
        while self._waiting:
            self._heal(*self._waiting.pop(0))

    def _heal(self, index: int, block: FFNBlock) -> None:
        if not self.began or not _can(self._model, block):
            return
        block.settle()
        self._context.progress(f"healing block {index}")
        assert self._context.streams is not None
        evidence = self._context.streams.evidence(block, inputs=False, neurons=True, weight=self._weight, target="stream")
        fit = better_down(block, evidence)
        if fit is not None:
            put_down(self._model, block, fit)
            self._context.streams.rewritten(block.output.name)
            self.healed.append(index)


def better_down(block: FFNBlock, evidence: Evidence) -> NeuronFit | None:
    """The down projection fitted anew with all neurons; None where tokens held out do not say that it is better."""
    if not (evidence.fit.rows and evidence.held_out.rows):
        return None
    prior, neurons = block.down.weight().astype(np.float64), np.arange(block.d_ff)
    bias = block.down.bias()
    fit, held_out = Features.of(evidence.fit, prior, 0), Features.of(evidence.held_out, prior, 0)
    now = held_out.error(neurons, prior, np.zeros(block.d_out) if bias is None else bias.astype(np.float64))
    ridge, error = choose_ridge(fit, held_out, neurons)
    if not error * max(held_out.tt, 1e-30) < _WORTH * now:
        return None
    return refit(Features.of(evidence.everything(), prior, 0), neurons, ridge, error)


def put_down(model: Model, block: FFNBlock, fit: NeuronFit) -> None:
    """``h V + c`` in the place of the down projection."""
    build = Builder(model, block.graph, block.name, block.down.linear.onnx_type)
    old = producer(block.output)
    take_over(block.output, build.linear(block.hidden, fit.matrix, fit.offset, axis=block.axis, hint="healed_down"))
    remove_dead(block.graph, [old] if old is not None else [])


def _can(model: Model, block: FFNBlock) -> bool:
    """Whether the down projection of ``block`` is its own to change, and the residual stream can be measured behind it."""
    return (why_not_narrow(block) is None and unmeasurable(model, block) is None and is_pure_branch(block)
            and block.down.linear.axis == block.axis and not is_shared(block.down.linear))
