"""How far a candidate is from the original at the model's outputs."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..graph.errors import InputError
from ..graph.model import Model
from ..runtime import Feeds, open_session
from ..runtime.metrics import OutputMetrics
from ..runtime.padding import Padding, rows_of
from ..runtime.specs import Array
from .goal import WHOLE

_MOST_HELD = 1 << 29  # bytes of the reference's outputs that are kept; beyond, it runs again each time
_PARTS = 8
Drift = dict[str, dict[str, float | None]]
Score = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], float]


class Yardstick:
    """Runs the original once, and candidates against it.

    Args:
        logits: outputs that are logits.
        perplexity: the output with the logits of the next token; score: the user's own metric.

    Attributes:
        outputs: the floating-point outputs.

    Raises:
        InputError: ``perplexity`` is no output, or no feed holds the tokens that it is about.
    """

    def __init__(self, original: Model, feeds: Feeds, *, provider: str, threads: int | None, logits: Sequence[str] = (),
                 perplexity: str | None = None, score: Score | None = None) -> None:
        self._feeds, self._options = feeds, {"provider": provider, "threads": threads}
        self._session = open_session(original, **self._options)  # type: ignore[arg-type]
        self.outputs = [spec.name for spec in self._session.outputs if spec.floating]
        if not self.outputs:
            raise InputError(f"{original.path}: has no floating-point output to measure the drift of")
        if perplexity is not None and perplexity not in self.outputs:
            raise InputError(f"--perplexity {perplexity}: no such output: choose from {', '.join(self.outputs)}")
        self.logits = {name for name in self.outputs if name in {*logits, "logits", perplexity}}
        self._perplexity, self._score = perplexity, score
        self._held: list[dict[str, Any]] | None = []

    def check(self) -> None:
        """Measure the original against itself on one feed: what fails here fails for every candidate.

        Raises:
            InputError: it cannot be measured: no feed with a row, no tokens for the perplexity, ones that its output has no logit
                for, or the user's own metric fails.
        """
        feed = self._feeds[0]
        found = self._reference(0, feed)
        self._check_rows()
        if self._perplexity is not None:
            self._check_tokens(self._perplexity, found[self._perplexity])
        if self._score is not None:
            self._own(found, found, feed)

    def _check_rows(self) -> None:
        """Leave out outputs that have no row in any feed."""
        seen: set[str] = set()
        for number, feed in enumerate(self._feeds):
            padding = Padding(feed)
            seen |= {name for name, value in self._reference(number, feed).items() if rows_of(value, padding).size}
            if len(seen) == len(self.outputs):
                return
        if not seen:
            raise InputError("no row to compare: every row of the feeds that choose is padding or empty: give feeds with tokens")
        self.outputs = [name for name in self.outputs if name in seen]

    def _check_tokens(self, output: str, logits: Array) -> None:
        name = token_input(self._feeds[0], logits)
        largest = max(int(feed[name].max(initial=0)) for feed in self._feeds)
        if largest >= logits.shape[-1]:
            raise InputError(f"--perplexity {output}: it has {logits.shape[-1]} numbers for a token, and '{name}' has the token "
                             f"{largest}: name the output with a logit for each token of the vocabulary")

    def measure(self, candidate: Model) -> Drift:
        """The metrics of each output, and of the whole model where there are any of it.

        Raises:
            InputError: ONNX Runtime refuses the candidate, or its outputs have other shapes.
        """
        return self.measure_parts(candidate, 0)[0]

    def measure_parts(self, candidate: Model, parts: int = _PARTS) -> list[Drift]:
        """The same over all feeds, and then over each of some parts of them, which say how sure it is."""
        session = open_session(candidate, **self._options)  # type: ignore[arg-type]
        parts = min(parts, len(self._feeds)) if len(self._feeds) > 1 else 0
        tallies = [_Tally(self.outputs, self.logits) for _ in range(1 + parts)]
        for number, feed in enumerate(self._feeds):
            ours, theirs = self._reference(number, feed), session.run(feed, self.outputs)
            for tally in tallies if not parts else (tallies[0], tallies[1 + number % parts]):
                tally.add(ours, theirs, feed)
                if self._perplexity is not None:
                    tally.add_loss(ours[self._perplexity], theirs[self._perplexity], feed)
                if self._score is not None:
                    tally.scores.append(self._own(ours, theirs, feed))
        return [tally.drift() for tally in tallies]

    def _own(self, ours: dict[str, Any], theirs: dict[str, Any], feed: dict[str, Any]) -> float:
        assert self._score is not None
        try:
            return float(self._score(ours, theirs, feed))
        except Exception as error:  # whatever the user's function raises
            raise InputError(f"--score: the function fails ({type(error).__name__}: {str(error)[:150]})") from None

    def _reference(self, number: int, feed: dict[str, Any]) -> dict[str, Any]:
        if self._held is not None and number < len(self._held):
            return self._held[number]
        found = self._session.run(feed, self.outputs)
        if self._held is not None and number == len(self._held):
            self._held.append(found)
            if sum(value.nbytes for each in self._held for value in each.values()) > _MOST_HELD:
                self._held = None
        return found


class _Tally:
    """Metrics over some feeds."""

    def __init__(self, outputs: Sequence[str], logits: set[str]) -> None:
        self._metrics = {name: OutputMetrics(name in logits) for name in outputs}
        self._losses, self._tokens = np.zeros(2), 0
        self.scores: list[float] = []

    def add(self, ours: dict[str, Any], theirs: dict[str, Any], feed: dict[str, Any]) -> None:
        padding = Padding(feed)
        for name, each in self._metrics.items():
            if ours[name].shape != theirs[name].shape:
                raise InputError(f"output '{name}' has another shape: {list(theirs[name].shape)}")
            each.update(ours[name], theirs[name], padding)

    def add_loss(self, ours: Array, theirs: Array, feed: dict[str, Any]) -> None:
        tokens = feed[token_input(feed, ours)]
        found = [next_token_loss(each, tokens, feed) for each in (ours, theirs)]
        self._losses += [loss for loss, _ in found]
        self._tokens += found[0][1]

    def drift(self) -> Drift:
        drift: Drift = {name: {key: _plain(value) for key, value in each.result().items()}
                        for name, each in self._metrics.items()}
        whole: dict[str, float | None] = {}
        if self._tokens:
            whole["perplexity"] = _plain(math.exp(min(float(self._losses[1] - self._losses[0]) / self._tokens, 700.0)))
        if self.scores:
            whole["score"] = _plain(float(np.mean(self.scores)))
        return {**drift, WHOLE: whole} if whole else drift


def load_score(text: str) -> Score:
    """The function ``module:function``: reference outputs, candidate outputs, feed → a number, 0 for no difference.

    Raises:
        InputError: there is none.
    """
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--score {text}: cannot be imported ({error}): write it like package.module:function") from None
    if not callable(found):
        raise InputError(f"--score {text}: is no function")
    return found


def token_input(feed: dict[str, Any], logits: Array) -> str:
    """The input with the token ids of a feed that ``logits`` ``[batch, tokens, vocabulary]`` belong to.

    Raises:
        InputError: no input has their shape.
    """
    for name in sorted(feed, key=lambda key: (key != "input_ids", key)):
        value = feed[name]
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.shape == logits.shape[:-1] and value.ndim:
            return name
    raise InputError(f"--perplexity: no input holds token ids of the shape {list(logits.shape[:-1])} that the logits have")


def next_token_loss(logits: Array, tokens: Array, feed: dict[str, Any]) -> tuple[float, int]:
    """−Σ ln p of each token given those before it, and of how many, padding left out."""
    before = logits[..., :-1, :].astype(np.float64)
    after = tokens[..., 1:]
    mask = feed.get("attention_mask")
    real = np.ones(after.shape, bool)
    if mask is not None and mask.shape == tokens.shape:
        real = (mask[..., 1:] > 0) & (mask[..., :-1] > 0)
    top = before.max(axis=-1)
    total = top + np.log(np.exp(before - top[..., None]).sum(axis=-1))
    chosen = np.take_along_axis(before, after[..., None].astype(np.int64), axis=-1)[..., 0]
    return float((total - chosen)[real].sum()), int(real.sum())


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
