"""fold-bias: constant additions, folded into each other and into what follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_graphsurgeon as gs

from ..graph.model import Model
from .base import Context, Pass, PassResult, Refused
from .exact import bias_rules
from .exact.value_bias import fold_value_bias

_Rule = Callable[[Model, gs.Graph, gs.Node], bool | Refused]


@dataclass(frozen=True)
class FoldBias(Pass):
    """Fold constant additions into one, into a bias, or away.

        (x + a) + b          →  x + (a + b)
        (x + a) W + c        →  x W + (a W + c)         where the linear has a bias, or can take one for nothing
        x + 0                →  x
        x W + b, x of rank 2 →  Gemm(x, W, b)
        Gemm(x, W, c) + b    →  Gemm(x, W, c + b);      Conv(x, W, c) + b likewise
        norm(x; γ, β)        →  norm(x; γ), and β W into the bias of every linear that reads it
        softmax(S) (x V + b) W + c  →  softmax(S) (x V) W + (b W + c)      as the rows of a softmax sum to 1

    The sums are taken in float64, so results differ by rounding only.

    Does not fire where another consumer reads the value before the addition, where a constant is an input that the caller
    may override, is shared so that the file would grow, or is so large that adding it in another order would round (above
    1e4; 16 in float16, 2 in bfloat16); where the addition may give its value more axes or another width; and not on the β
    of a norm that is written out in single operators, since ONNX Runtime recognizes that norm by its last Add.
    """

    name: ClassVar[str] = "fold-bias"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Apply every rule in turn until none fires."""
        fired = 0
        refused: dict[tuple[str, str], Refused] = {}
        for path, graph in model.graphs():
            rules = [*_RULES]
            if path == "main":
                rules.append(partial(fold_value_bias, context=context))
            changed = True
            while changed:
                changed = False
                for rule in rules:
                    for node in list(graph.nodes):
                        if not node.outputs:
                            continue  # removed meanwhile
                        outcome = rule(model, graph, node)
                        if isinstance(outcome, Refused):
                            refused[(outcome.value, outcome.reason)] = outcome
                        elif outcome:
                            fired += 1
                            changed = True
        return self.result(fired, list(refused.values()))


_RULES: tuple[_Rule, ...] = (
    bias_rules.drop_zero, bias_rules.merge_adds, bias_rules.into_following_linear, bias_rules.into_product,
    bias_rules.norm_shift)
