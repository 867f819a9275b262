"""Which errors of a block count how much: by the gain of the norm that alone reads the sum behind it (post-LN).

    ‖e‖²_G = Σ_d g_d e_d²        g = (1 − α) γ² / mean(γ²) + α

γ is the gain of that norm; what the norm divides by is left to the weights of tokens. Where the stream goes on beside the norm
(pre-LN), too much else reads it, and all channels count alike.

A least-squares fit of the down projection alone is, for one λ, the same in any such metric, as each of its columns is. Which
neurons are worth most, and where they are moved to, is not. So targets and the rows of the down projection are multiplied by
√g, and what was fitted is divided by it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.edit import consumers, is_output
from ...graph.norm import Norm, read_norm
from ...graph.residual import SKIP_NORMS
from .neuron_fit import NeuronFit

Array = npt.NDArray[Any]
_ALIKE = 0.25  # α
_SUM = 3  # the output of a SkipLayerNormalization that is the sum in front of the norm
_NODES = 12  # a norm that is written out has at most so many


@dataclass(frozen=True)
class ReadMetric:
    """A weight for each channel.

    Attributes:
        root: √g ``[d_out]``.
    """

    root: Array

    def into(self, rows: Array) -> Array:
        """``rows [n, d_out]`` as the plain norm is to see them."""
        found: Array = rows.astype(np.float64) * self.root
        return found

    def out_of(self, fit: NeuronFit) -> NeuronFit:
        """``fit``, made of what went in, as the block is to compute it."""
        return dataclasses.replace(fit, matrix=fit.matrix / self.root, offset=fit.offset / self.root,
                                   affine=None if fit.affine is None else fit.affine / self.root)


def read_metric(block: FFNBlock) -> ReadMetric | None:
    """The metric of the output of ``block``; None where all channels count alike."""
    if block.axis != -1 or block.join.residual is not block.input or not block.join.direct:
        return None
    norm = _only_reader(block.graph, block.join.node)
    if norm is None or norm.width != block.d_out:
        return None
    squares = np.asarray(norm.scale.load(), np.float64) ** 2
    average = float(squares.mean())
    if not (np.isfinite(average) and average > 0):
        return None
    return ReadMetric(np.sqrt((1 - _ALIKE) * squares / average + _ALIKE))


def _only_reader(graph: gs.Graph, join: gs.Node) -> Norm | None:
    """The norm that reads the sum of ``join``, if nothing else does."""
    if join.op in SKIP_NORMS:
        return None if len(join.outputs) > _SUM and join.outputs[_SUM].name else read_norm(join)
    total = join.outputs[0]
    if is_output(graph, total):
        return None
    pending, seen = consumers(total), list[gs.Node]()
    while pending and len(seen) < _NODES:
        node = pending.pop(0)
        if any(node is each for each in seen):
            continue
        seen.append(node)
        norm = read_norm(node)
        if norm is not None and norm.input is total:
            inside = {id(each) for each in norm.nodes}
            return norm if all(id(each) in inside for each in consumers(total)) else None
        pending += [each for output in node.outputs for each in consumers(output)]
    return None
