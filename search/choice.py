"""One form for each unit: the least of one sum while others stay within limits.

    minimize    Σ_u Σ_c cost[u, c] x[u, c]
    subject to  Σ_c x[u, c] = 1                      for each unit u
                Σ_u Σ_c size[k, u, c] x[u, c] ≤ limit[k]   for each limit k,   x binary

Source: block-wise choice under a latency budget, Puzzle, arXiv 2411.19146; solved by HiGHS through ``scipy.optimize.milp``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .candidates import Candidate, Choice

Sizes = Mapping[tuple[int, Candidate], float]
_GAP = 1e-6


@dataclass(frozen=True)
class Bound:
    """A sum over the choice that must not exceed ``limit``."""

    sizes: Sizes
    limit: float


def choose(units: Mapping[int, Sequence[Candidate]], costs: Sizes, bounds: Sequence[Bound]) -> dict[int, Candidate] | None:
    """The choice with the least sum of ``costs`` within ``bounds``; None where there is none."""
    from scipy import sparse  # takes 0.3 s to import
    from scipy.optimize import Bounds, LinearConstraint, milp

    variables = [(unit, each) for unit, several in units.items() for each in several
                 if all(math.isfinite(bound.sizes[unit, each]) for bound in bounds) and math.isfinite(costs[unit, each])]
    rows = {unit: row for row, unit in enumerate(units)}
    if {unit for unit, _ in variables} != set(units):
        return None
    one = sparse.csr_matrix((np.ones(len(variables)), ([rows[unit] for unit, _ in variables], range(len(variables)))),
                            shape=(len(rows), len(variables)))
    constraints = [LinearConstraint(one, 1, 1)]
    for bound in bounds:
        sizes = np.array([bound.sizes[variable] for variable in variables])
        scale = max(abs(bound.limit), 1e-12)  # HiGHS's tolerance is absolute
        constraints.append(LinearConstraint(sizes[None, :] / scale, -np.inf, bound.limit / scale))
    weights = np.array([costs[variable] for variable in variables])
    spread = max(float(np.abs(weights).max()), 1e-12)
    found = milp(weights / spread, constraints=constraints, bounds=Bounds(0, 1), integrality=np.ones(len(variables), np.int64),
                 options={"mip_rel_gap": _GAP, "time_limit": 60.0})
    if found.x is None:
        return None
    return {unit: each for (unit, each), value in zip(variables, found.x, strict=True) if value > 0.5}


def text_of(choice: Choice) -> str:
    """A choice in one line: units in order, without those that are kept."""
    return " ".join(f"{unit}:{each}" for unit, each in sorted(choice.items()) if str(each) != "keep") or "keep"
