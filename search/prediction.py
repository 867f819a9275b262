"""What a choice will cost and gain: sums over units, corrected by the choices that were measured.

    damage   D = e^a S^p,  S = Σ_u m[u, c] s[u, c]      s: measured alone;  a, p, m: fitted, 0, 1 and 1 before
    time     T = T_base − Σ_u g[c] v[u, c]              v: saved, measured alone;  g: fitted, 1 before;  T_base: mean of its races

Errors of blocks are not independent, and a fit makes good what the blocks before it did wrong, so sums are only a beginning:
after each choice that was built and measured, a, p and the multipliers move to the least-squares fit, held near where they began.
D grows with S, so that a limit on D stays a limit on a sum, which is what the integer program takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .candidates import KEEP, Candidate, Choice
from .choice import Sizes

_SCATTER = 0.1  # of ln D around the law
_OF_SCALE, _OF_POWER, _OF_UNIT = 1.0, 0.15, 0.5  # how far ln e^a, p and ln m may lie from 0, 1 and 0
_OF_SAVING, _OF_ALL_SAVINGS, _OF_TIME = 0.15, 0.4, 0.02  # how far g of one form, g of all and T may lie
_STEPS = 5


@dataclass
class Damage:
    """The law of one metric.

    Attributes:
        alone: what each unit does by itself in each form.
        scale, power: a and p; multipliers: m, where it is not 1.
    """

    alone: Sizes
    scale: float = 0.0
    power: float = 1.0
    multipliers: dict[tuple[int, Candidate], float] = field(default_factory=dict)

    def sizes(self) -> Sizes:
        """m s, of which S is the sum."""
        return {key: value * self.multipliers.get(key, 1.0) for key, value in self.alone.items()}

    def of(self, choice: Choice) -> float:
        """D."""
        total = sum(self.alone[item] * self.multipliers.get(item, 1.0) for item in choice.items())
        return 0.0 if total <= 0 else math.exp(self.scale) * total ** self.power

    def sum_at(self, damage: float) -> float:
        """The S at which D is ``damage``."""
        return float((damage / math.exp(self.scale)) ** (1 / self.power)) if damage > 0 else 0.0

    def learn(self, measured: Sequence[tuple[Choice, float]]) -> None:
        """Fit a, p and m to choices and the damage that they did."""
        points = [(choice, math.log(found)) for choice, found in measured
                  if 0 < found < math.inf and 0 < sum(self.alone[item] for item in choice.items()) < math.inf]
        self.scale, self.power, self.multipliers = 0.0, 1.0, {}
        if not points:
            return
        keys = sorted({item for choice, _ in points for item in choice.items() if self.alone[item] > 0}, key=str)
        prior = np.array([1 / _OF_SCALE, 1 / _OF_POWER, *[1 / _OF_UNIT] * len(keys)])
        state = np.array([0.0, 1.0, *[0.0] * len(keys)])  # a, p, ln m
        center = state.copy()
        for _ in range(_STEPS):  # Gauss-Newton: ln S is not linear in ln m
            jacobian, residual = np.zeros((len(points), len(state))), np.zeros(len(points))
            for row, (choice, found) in enumerate(points):
                parts = np.array([self.alone[key] * math.exp(state[2 + place]) if choice.get(key[0]) == key[1] else 0.0
                                  for place, key in enumerate(keys)])
                total = float(parts.sum())
                jacobian[row] = [1.0, math.log(total), *(state[1] * parts / total)]
                residual[row] = found - state[0] - state[1] * math.log(total)
            left = jacobian.T @ jacobian / _SCATTER ** 2 + np.diag(prior ** 2)
            right = jacobian.T @ residual / _SCATTER ** 2 - prior ** 2 * (state - center)
            state = state + np.linalg.solve(left, right)
            state[1] = min(max(state[1], 0.5), 2.0)
        self.scale, self.power = float(state[0]), float(state[1])
        self.multipliers = {key: math.exp(value) for key, value in zip(keys, state[2:], strict=True)}


@dataclass
class Time:
    """The law of the time, as a part of the original's.

    Attributes:
        base: after the exact passes, as it was measured first; saved: by each unit in each form, measured alone.
        general, gains: by what all savings are multiplied, and those of a form beside.
        level: after the exact passes, over all races.
    """

    base: float
    saved: Sizes
    general: float = 1.0
    gains: dict[str, float] = field(default_factory=dict)
    level: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.base

    def sizes(self) -> dict[tuple[int, Candidate], float]:
        """What each unit in each form saves."""
        return {(unit, each): value * (self.general + self.gains.get(str(each), 0.0))
                for (unit, each), value in self.saved.items()}

    def of(self, choice: Choice) -> float:
        """T."""
        sizes = self.sizes()
        return max(0.02, self.level - sum(sizes[item] for item in choice.items()))

    def learn(self, measured: Sequence[tuple[Choice, float]]) -> None:
        """Fit the gains to choices and their times."""
        names = sorted({str(each) for choice, _ in measured for each in choice.values()})
        self.general, self.gains = 1.0, {}
        if not measured:
            return
        self.level = float(np.mean([self.base, *(time for choice, time in measured if set(choice.values()) <= {KEEP})]))
        features = np.zeros((len(measured), 1 + len(names)))
        target = np.zeros(len(measured))
        for row, (choice, time) in enumerate(measured):
            for item in choice.items():
                features[row, 0] += self.saved[item]
                features[row, 1 + names.index(str(item[1]))] += self.saved[item]
            target[row] = self.level - time - features[row, 0]
        prior = np.array([1 / _OF_ALL_SAVINGS, *[1 / _OF_SAVING] * len(names)])
        found = np.linalg.solve(features.T @ features / _OF_TIME ** 2 + np.diag(prior ** 2), features.T @ target / _OF_TIME ** 2)
        self.general = 1.0 + float(found[0])
        self.gains = dict(zip(names, map(float, found[1:]), strict=True))


def total(sizes: Mapping[tuple[int, Candidate], float], choice: Choice) -> float:
    """The sum over a choice."""
    return sum(sizes[item] for item in choice.items())
