"""What each pass of a plan contributed to the size, the drift and the speed of what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...graph.model import Model
from ...runtime import Feeds, Variant, compare, race
from ..base import PassResult
from .verification import spread

SECONDS = 2.0
"""How long the model after a pass is raced against the plan's input, and against the model before that pass."""
DRIFT_SECONDS = 15.0
"""About how long the drift after a pass is measured. Where all feeds would take longer (a decoder gives a number for each word of
its vocabulary at each token), the same few are taken after every pass."""


class Contributions:
    """Keeps the model as it stands after each pass that changed it, its weights where they are.

    Args:
        model: the plan's input, before any pass.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._nodes = model.to_proto()[0]
        self._states: list[tuple[int, Model]] = []

    def after(self, done: int) -> None:
        """``done`` passes are done."""
        nodes = self._model.to_proto()[0]
        if nodes.graph != self._nodes.graph:
            self._nodes = nodes
            self._states.append((done - 1, self._model.copy()))

    def measure(self, source: Path, results: Sequence[PassResult], feeds: Feeds,
                progress: Callable[[str], None] = lambda message: None, **session: Any) -> list[dict[str, Any]]:
        """A row for each pass that changed the model, in the order of the plan.

        Args:
            source: the plan's input.
            results: of the passes of the plan, in order.
            feeds: inputs to measure on.
            session: ``provider``, ``threads``, ``use_tf32``, ``allow_cpu``.

        Returns:
            Each row: ``name`` of the pass, ``exact``; ``bytes`` of the model after it; ``samples``, how many feeds it was
            measured on; ``drift``, output → ``rel_l2`` and ``cosine_mean`` of the model after it against the plan's input;
            ``added``, output → how much more ``rel_l2`` that is than after the pass before; ``speed``, with its interval,
            against the plan's input; and ``gained``, the same against the model before this pass.

        Raises:
            InputError: ONNX Runtime refuses one of the models.
        """
        rows: list[dict[str, Any]] = []
        before: dict[str, float] = {}
        previous: Path | Model = source
        if self._states:
            feeds = _affordable(source, self._states[0][1], feeds, session)
        for number, state in self._states:
            name = results[number].name
            progress(f"what {name} contributed")
            outputs = compare(source, state, feeds, **session).to_json()["outputs"]
            drift = {output: {key: found[key] for key in ("rel_l2", "cosine_mean")} for output, found in outputs.items()}
            speed = _speed(source, state, feeds, session)
            rows.append({
                "name": name, "exact": results[number].exact, "bytes": Variant(state).bytes,
                "samples": len(feeds), "drift": drift,
                "added": {output: found["rel_l2"] - before.get(output, 0.0) for output, found in drift.items()
                          if found["rel_l2"] is not None},
                "speed": speed, "gained": speed if previous is source else _speed(previous, state, feeds, session)})
            before = {output: found["rel_l2"] or 0.0 for output, found in drift.items()}
            previous = state
        return rows


def _affordable(source: Path, state: Model, feeds: Feeds, session: dict[str, Any]) -> Feeds:
    """As many of ``feeds``, from beginning to end, as can be compared in ``DRIFT_SECONDS``, but one at least."""
    start = time.perf_counter()
    compare(source, state, feeds[:1], **session)
    return spread(feeds, max(1, int(DRIFT_SECONDS / (time.perf_counter() - start))))


def _speed(reference: Path | Model, state: Model, feeds: Feeds, session: dict[str, Any]) -> dict[str, Any]:
    ratio = race([Variant(reference, "before"), Variant(state, "after")], feeds, seconds=SECONDS, **session)["ratios"][0]
    return {key: ratio[key] for key in ("speedup", "low", "high")}
