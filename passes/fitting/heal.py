"""Blocks that stay make good what the blocks rewritten before them did wrong.

    y = h V + b   →   y = h V' + b',    V' = argmin Σ_t w_t ‖t_t − h_t V' − b'‖² + λ Σ_i var(h_i) ‖V'_i − V_i‖²

h are all the neurons of a block that nothing else is done to, t what brings the residual stream back to where the original model
has it (``target=stream`` in :mod:`evidence`). Then the neurons themselves are moved by gradient descent on the block alone, down,
up and gate together (:mod:`refinement`), where all of these are the block's own. The shapes of the weights stay what they are; a
down projection without a bias gets one, and a Gemm is written as MatMul and Add. All only where tokens that are held out say that
it helps.

Source: docs/approximations.md; the least squares of STAT, arXiv 2406.00061, with no neuron left out.
"""

from __future__ import annotations

import numpy as np

from ...graph.block import FFNBlock
from ...graph.model import Model
from ...graph.narrow import why_not_narrow
from ..base import Context
from ..blocks import Blocks
from ..exact.sharing import is_shared
from .bypass import is_pure_branch
from .evidence import Evidence
from .kept_rows import KeptRows
from .less_work import shown_inside
from .linear_tasks import put_matrices
from .measure import unmeasurable
from .moved import moved
from .neuron_fit import Features, NeuronFit, choose_ridge, refit

_WORTH = 0.99  # of the error as it is, which tokens held out must have less than


class Healer:
    """Goes along with a pass that rewrites blocks in order of execution, and heals those between and behind them.

    Args:
        context: with ``streams``, which the pass goes through too.
        chosen: the blocks that the pass rewrites, or would.
        weight: how tokens are weighted.
        refine: how often the descent goes through the tokens; 0: not at all.
    """

    def __init__(self, model: Model, context: Context, chosen: Blocks, weight: str, refine: int) -> None:
        self._model, self._context, self._weight, self._refine = model, context, weight, refine
        there = context.ledger.blocks
        self._order = {index: place for place, index in enumerate(there)}
        self._waiting = [(index, block) for index, block in there.items() if index not in chosen]
        self.began = False
        self.healed: list[int] = []
        self.moved: list[int] = []
        self._unmoved: list[str] = []

    def before(self, index: int) -> None:
        """Heal what runs before block ``index``, which comes next."""
        while self._waiting and self._order[self._waiting[0][0]] < self._order[index]:
            self._heal(*self._waiting.pop(0))

    def rest(self) -> None:
        """Heal what runs behind all of them."""
        while self._waiting:
            self._heal(*self._waiting.pop(0))

    def notes(self) -> list[str]:
        """What was done to which blocks, and why the neurons of some of them stay."""
        too = f" and the neurons of blocks {Blocks(tuple(self.moved))} were moved" if self.moved else ""
        return [f"the down projections of blocks {Blocks(tuple(self.healed))} were fitted anew{too}, to make good what the "
                "affine blocks before them do wrong (heal=false leaves them)", *self._unmoved]

    def _heal(self, index: int, block: FFNBlock) -> None:
        if not self.began or not _can(self._model, block):
            return
        block.settle()
        self._context.progress(f"healing block {index}")
        streams = self._context.streams
        assert streams is not None
        rows = KeptRows(streams.feeds) if self._refine and _can_move(block) else None
        evidence = streams.evidence(block, inputs=False, neurons=True, weight=self._weight, target="stream", keep=rows)
        fit = better_down(block, evidence)
        if fit is None:
            return
        if rows is not None:
            prior = block.down.weight().astype(np.float64)
            fit, reason = moved(block, evidence, prior, fit, rows, self._refine, self._context, f"healing block {index}")
            if not fit.projections:
                self._unmoved.append(f"the neurons of block {index} were not moved: {reason}")
        put_healed(self._model, block, fit)
        streams.rewritten(block.output.name)
        self.healed.append(index)
        if fit.projections:
            self.moved.append(index)


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


def put_healed(model: Model, block: FFNBlock, fit: NeuronFit) -> None:
    """``h V + c`` in the place of the down projection, and what was moved in that of the other linears."""
    if fit.projections:
        _put_projections(model, block, fit)
    down = block.down
    own = fit.offset - sum((extra().reshape(-1).astype(np.float64) for extra in down.extra_bias), np.zeros(block.d_out))
    put_matrices(model, block, down.linear, [fit.matrix], own)


def _put_projections(model: Model, block: FFNBlock, fit: NeuronFit) -> None:
    """Up and gate as they were moved; columns of their linears that the block does not use stay."""
    whole = {id(leaf.linear): (leaf.linear, leaf.linear.weight().astype(np.float32),
                               None if leaf.linear.bias is None else leaf.linear.bias().astype(np.float32))
             for leaf in block.region.leaves}
    for leaf, (matrix, bias) in zip(block.region.leaves, fit.projections, strict=True):
        _, weight, own = whole[id(leaf.linear)]
        columns = slice(None) if leaf.columns is None else leaf.columns
        weight[:, columns] = matrix
        if own is not None:
            own[columns] = bias
    for linear, weight, own in whole.values():
        put_matrices(model, block, linear, [weight], own)


def _can(model: Model, block: FFNBlock) -> bool:
    """Whether the down projection of ``block`` is its own to change, and the residual stream can be measured behind it."""
    return (why_not_narrow(block) is None and unmeasurable(model, block) is None and is_pure_branch(block)
            and block.down.linear.axis == block.axis and not is_shared(block.down.linear))


def _can_move(block: FFNBlock) -> bool:
    """Whether all its linears are its own to change, and nothing else reads what they give."""
    return not shown_inside(block) and not any(is_shared(linear) for linear in block.linears())
