"""What a rewrite changed, and that it changed nothing: nodes, what ONNX Runtime executes, outputs on odd inputs too."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...graph.errors import InputError
from ...graph.model import Model
from ...runtime import Feeds, Session, Source, open_session
from ...runtime.adversarial import adversarial_feeds
from ...runtime.agreement import disagreement, largest_difference
from ...runtime.executed import count_ops, executed_ops
from ...runtime.padding import MASKS, Padding, rows_of


@dataclass(frozen=True)
class Equivalence:
    """Two models side by side.

    Attributes:
        nodes: nodes in the file, inner graphs included: ``before`` and ``after``.
        executed: nodes that ONNX Runtime executes after its own optimizations; None where it was not asked.
        operators: for each operator that ONNX Runtime executes another number of times (fusions lost and gained show
            here): ``before`` and ``after``.
        differences: kind of inputs → largest ``max|after − before| / max|before|`` over feeds and outputs; a sentence
            where the outputs differ in kind (type, shape, what is finite); None where neither model takes such inputs. Rows of
            padding do not count.
    """

    nodes: dict[str, int]
    executed: dict[str, int] | None
    operators: dict[str, dict[str, int]]
    differences: dict[str, float | str | None]

    def to_json(self) -> dict[str, Any]:
        """The report's entry ``equivalence``."""
        return {"nodes": self.nodes, "executed": self.executed, "operators": self.operators, "differences": self.differences}


def equivalence(before: Source, after: Source, feeds: Feeds | None = None, *, provider: str = "cpu",
                threads: int | None = None) -> Equivalence:
    """Compare two models.

    Args:
        feeds: inputs to compare on; adversarial ones are made from the first of them. None: only nodes are compared.

    Raises:
        InputError: ONNX Runtime refuses one of the two.
    """
    written = [count_nodes(source if isinstance(source, Model) else Model.load(source)) for source in (before, after)]
    first, second = (executed_ops(source, provider=provider, threads=threads) for source in (before, after))
    operators = {op: {"before": first[op], "after": second[op]} for op in sorted(first | second) if first[op] != second[op]}
    differences = _differences(before, after, feeds, provider, threads) if feeds is not None and len(feeds) else {}
    return Equivalence(_pair(*written), _pair(_total(first), _total(second)), operators, differences)


def count_nodes(model: Model) -> int:
    """Nodes of ``model`` as it stands, inner graphs included."""
    return sum(count_ops(model.to_proto()[0].graph).values())


def _pair(before: int, after: int) -> dict[str, int]:
    return {"before": before, "after": after}


def _total(counts: Counter[str]) -> int:
    return sum(counts.values())


def _differences(before: Source, after: Source, feeds: Feeds, provider: str,
                 threads: int | None) -> dict[str, float | str | None]:
    ours, theirs = (open_session(source, provider=provider, threads=threads) for source in (before, after))
    found: dict[str, float | str | None] = {}
    largest: float | str | None = 0.0
    for feed in feeds:
        found["given"] = largest = _worse(largest, _difference(ours, theirs, feed))
    masks = {name: value for name, value in feeds[0].items() if name in MASKS}  # as they are: all padding would show nothing
    for kind, feed in adversarial_feeds(feeds[0]).items():
        found[kind] = _difference(ours, theirs, {**feed, **masks})
    return found


def _worse(one: float | str | None, other: float | str | None) -> float | str | None:
    numbers = [each for each in (one, other) if isinstance(each, float)]
    return next((each for each in (one, other) if isinstance(each, str)), max(numbers, default=None))


def _difference(ours: Session, theirs: Session, feed: dict[str, Any]) -> float | str | None:
    first, second = _run(ours, feed), _run(theirs, feed)
    if first is None or second is None:
        return None if first is second else f"only the {'second' if first is None else 'first'} model takes them"
    padding = Padding(feed)
    first, second = ({name: _counted(value, padding) for name, value in each.items()} for each in (first, second))
    return disagreement(first, second) or largest_difference(first, second)


def _counted(value: Any, padding: Padding) -> Any:
    """``value`` without its rows of padding, where it has some."""
    padded = isinstance(value, np.ndarray) and value.ndim > 1 and value.size and padding.kept(value.shape) is not None
    return rows_of(value, padding) if padded else value


def _run(session: Session, feed: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return session.run(feed)
    except InputError:
        return None
