"""The exact passes at the head of a plan, and the proof that they changed nothing."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from ...graph.model import Model
from ...runtime import Feeds
from ..plan import Plan
from .equivalence import Equivalence, count_nodes, equivalence

_MOST = 8  # feeds that the two models are compared on
_NOTICED = 1e-4


class ExactPart:
    """Keeps a model as it is behind the exact passes that a plan begins with.

    Args:
        model: before any pass.
        plan: will be run on it.
        compared: whether the outputs are going to be compared, for which a copy is needed where the plan goes on.
    """

    def __init__(self, model: Model, plan: Plan, compared: bool) -> None:
        self._model = model
        self._plan = plan
        self._compared = compared
        self.names = [each.name for each in takewhile(lambda each: each.exact, plan)]
        self._nodes = {"before": count_nodes(model)} if self.names else {}
        self._kept: Model | None = None

    def after(self, done: int) -> None:
        """``done`` passes are done."""
        if done == len(self.names):
            self._nodes["after"] = count_nodes(self._model)
            if self._compared and done < len(self._plan):
                self._kept = self._model.copy()

    def report(self, before: Path, after: Path, feeds: Feeds | None, **session: Any) -> dict[str, Any] | None:
        """The report's entry ``equivalence``; None where the plan begins with no exact pass.

        Args:
            before, after: the files of the model before and after the whole plan.
            feeds: what to compare on; None: only nodes are counted.
        """
        if not self.names:
            return None
        found = Equivalence(self._nodes, None, {}, {})
        if feeds is not None and self._compared:
            found = equivalence(before, self._kept or after, feeds[:_MOST], **session)
        return {"passes": self.names, **found.to_json()}


def moved(report: dict[str, Any] | None) -> list[str]:
    """Sentences about inputs on which the exact passes changed an output."""
    differences = report["differences"] if report is not None else {}
    return [f"the exact passes changed an output on {kind} inputs: {_said(difference)}" for kind, difference in
            differences.items() if isinstance(difference, str) or (difference is not None and difference > _NOTICED)]


def _said(difference: float | str) -> str:
    return difference if isinstance(difference, str) else f"by {difference:.1e} of its largest number"
