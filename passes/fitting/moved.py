"""A block's neurons moved after the closed form, once for a run that is started again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.block import FFNBlock
from ..base import Context
from .evidence import Evidence
from .kept_rows import KeptRows
from .neuron_fit import Features, NeuronFit, refit
from .refinement import refined

Array = npt.NDArray[Any]


def moved(block: FFNBlock, evidence: Evidence, prior: Array, fit: NeuronFit, rows: KeptRows, passes: int, context: Context,
          who: str) -> tuple[NeuronFit, str]:
    """``fit`` with its neurons moved and "", or as it is and the reason (see :func:`~.refinement.refined`).

    Args:
        evidence: what ``fit`` was fitted to.
        prior: the map of all features of ``evidence`` that the block has, ``[inputs + d_ff, d_out]``.
        rows: the same tokens themselves; used up.
        passes: how often the descent goes through them.
        who: what progress is said of.
    """
    held = None if context.resume is None else context.resume.load_arrays()
    if held is not None:
        return NeuronFit.of_arrays(held), str(held["reason"])
    reason = "no token is held out"
    if evidence.fit.rows and evidence.held_out.rows:
        alone = Features.of(evidence.fit, prior, len(prior) - block.d_ff)
        start = refit(alone, fit.neurons, fit.ridge, fit.error)
        fit, reason = refined(block, start, fit, rows, passes, lambda message: context.progress(f"{who}, {message}"))
    if context.resume is not None:
        context.resume.save_arrays({**fit.to_arrays(), "reason": np.asarray(reason)})
    return fit, reason
