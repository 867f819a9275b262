"""What the feeds say about a block: moments of its input, its neurons and what it should give.

The target of a block is what brings the residual stream back to where the original model has it,

    target=stream   t = (r_original + y_original) − r_now
    target=block    t = y_original
    target=own      t = y, what the block gives now
    target=sum      t = r_original + y_original

so that a block also makes good what the rewritten blocks before it did wrong. Where a scale λ lies between the block and the
residual Add, (r_original − r_now) / λ is added to y_original; where a norm does, what moves its output by as much, to first
order (see :mod:`branch`). Where something else does, or the feeds take another way through the rewritten model (a router),
``stream`` cannot be stated in y, and the target is y_original, or what the block itself gives now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import FFNBlock
from ...graph.ffn import find_ffn_blocks
from ...graph.model import Model
from ...runtime import Scatter
from ..base import Context
from .branch import branch_of
from .bypass import is_pure_branch
from .kept_rows import KeptRows
from .measure import Finite
from .read_metric import ReadMetric, read_metric
from .stream import Stream
from .token_weights import has_branch_norm, token_weights, weight_values
from .varied_feeds import varied

Array = npt.NDArray[Any]
Target = Literal["stream", "block", "own"]
Sum = Literal["sum"]  # what a block gives together with its residual
HELD_OUT = 5  # every fifth feed (or row, where there are few feeds) chooses
JUDGING = 4  # every fourth of those, where there are feeds enough for two, judges what is fitted to the tokens themselves
_RUNS = 25  # of neighbouring feeds, every fifth of which chooses, where runs are held out


class OutOfTimeError(Exception):
    """Whoever asked for moments said that it is too late for them."""


@dataclass
class Evidence:
    """Moments of the groups [x, h, t], [h, t] or [x, t], further values before t.

    Attributes:
        fit, held_out: over tokens to fit on, and over others that choose.
        beside: over varied copies of the tokens held out, which therefore choose nothing.
        finite: how many tokens there were, those left out included.
        metric: what t went through, where its channels do not all count alike.
    """

    fit: Scatter
    held_out: Scatter
    beside: Scatter
    finite: Finite = field(default_factory=Finite)
    metric: ReadMetric | None = None

    @property
    def rows(self) -> int:
        """Tokens seen."""
        return self.fit.rows + self.held_out.rows + self.beside.rows

    def without_inputs(self) -> Evidence:
        """Of the groups after the first alone."""
        return Evidence(self.fit.without_first(), self.held_out.without_first(), self.beside.without_first(), self.finite,
                        self.metric)

    def everything(self) -> Scatter:
        """All together."""
        together = Scatter()
        for part in (self.fit, self.held_out, self.beside):
            together.merge(part)
        return together


class Streams:
    """The model as it is being rewritten and the model as it was, gone through side by side, block after block.

    A context manager. Blocks must be asked for in order of execution.

    Args:
        vary: varied copies of the feeds to go through beside them (see :mod:`varied_feeds`).
        runs: hold out runs of neighbouring feeds (25 in all), not single ones: what was cut from one picture or text often lies
            together.
    """

    def __init__(self, model: Model, context: Context, vary: int = 0, *, runs: bool = False) -> None:
        assert context.fit is not None
        feeds = varied(model, context.fit, vary)
        self._real = len(context.fit)
        self._feeds = len(feeds)
        self._runs = min(_RUNS, self._real) if runs else self._real
        self._resume = context.resume
        self._now = Stream(model, feeds, context)
        original, self._residuals = _original(model, context)
        self._original = Stream(original, feeds, context)
        self._model, self._context = model, context

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._now.__exit__(kind, error, trace)
        self._original.__exit__(kind, error, trace)

    @property
    def feeds(self) -> int:
        """How many feeds are gone through, varied copies counted."""
        return self._feeds

    def rewritten(self, name: str) -> None:
        """Say that the value ``name`` is computed in another way from now on."""
        self._now.forget(name)

    def evidence(self, block: FFNBlock, *, inputs: bool, neurons: bool, weight: str, target: Target | Sum,
                 more: Sequence[gs.Tensor] = (), keep: KeptRows | None = None, as_read: bool = False,
                 late: Callable[[], bool] = lambda: False) -> Evidence:
        """Go through the feeds once.

        Args:
            inputs, neurons: which features to take moments of.
            weight: how tokens are weighted (see :mod:`token_weights`).
            more: values with their features where the block has them, whose features come behind those.
            keep: takes the inputs, the targets and the weights themselves (of varied copies what is fitted to alone).
            as_read: t goes through the metric of what reads it (see :mod:`read_metric`), where there is one.
            late: asked after each feed.

        Raises:
            OutOfTimeError: it was ``late``.
        """
        kept = None if self._resume is None else self._resume.load(3)
        found = Evidence(kept[0], kept[1], kept[2]) if kept else Evidence(Scatter(), Scatter(), Scatter())
        found.metric = metric = read_metric(block) if as_read else None
        few = self._real < HELD_OUT
        gathered = self._rows(block, inputs or keep is not None, neurons, weight, target, more)
        for number, (features, y, t, weights) in enumerate(gathered):
            if late():
                raise OutOfTimeError
            if kept and keep is None and found.rows:
                continue
            t = t if metric is None else metric.into(t)
            good = found.finite(t, weights, *features)
            position = np.arange(len(y)) if few else np.full(len(y), number % self._real * self._runs // self._real)
            held = position % HELD_OUT == HELD_OUT - 1
            if keep is not None:
                enough = self._runs >= 2 * HELD_OUT * JUDGING
                judging = held & (position // HELD_OUT % JUDGING == 0) if enough else held
                taken = good if number < self._real else good & ~judging
                keep.add(features[0][taken], t[taken], weights[taken], judging[taken])
                features = features if inputs else features[1:]
            if kept:
                continue
            choosing = found.held_out if number < self._real else found.beside
            for moments, chosen in ((found.fit, good & ~held), (choosing, good & held)):
                if chosen.any():
                    moments.update(*(group[chosen] for group in features), t[chosen], weights=weights[chosen])
        if self._resume is not None and not kept:
            self._resume.save(found.fit, found.held_out, found.beside)
        return found

    def pass_by(self, block: FFNBlock, *, inputs: bool, neurons: bool, weight: str, target: Target | Sum) -> None:
        """Go through the feeds for nothing but what later blocks see, to the last bit as behind :meth:`evidence`."""
        for _ in self._rows(block, inputs, neurons, weight, target, ()):
            pass

    def tokens(self, block: FFNBlock, tensors: Sequence[gs.Tensor], axes: Sequence[int],
               weight: str, finite: Finite) -> Iterator[tuple[list[Array], Array]]:
        """For each feed the values of ``tensors`` as they are now, ``[rows, features]`` each, and the weights of the rows.

        Args:
            tensors: of the block; axes: where each has its features, counted from the end.
            finite: picks the rows.
        """
        wanted = [*tensors, block.output, *weight_values(block, weight)]
        places = [*axes, *[block.axis] * (len(wanted) - len(axes))]
        for values in self._now.rows([tensor.name for tensor in wanted], places):
            found, (y, *others) = values[:len(tensors)], values[len(tensors):]
            weights = token_weights(block, y, others, weight)
            good = finite(y, weights, *found)
            if good.any():
                yield [each[good] for each in found], weights[good]

    def _rows(self, block: FFNBlock, inputs: bool, neurons: bool, weight: str, target: Target | Sum,
              more: Sequence[gs.Tensor]) -> Iterator[tuple[list[Array], Array, Array, Array]]:
        """For each feed the features, y, t and the weights of its tokens."""
        pure = is_pure_branch(block) and target != "own"
        branch = None
        if pure and target == "stream":
            branch = branch_of(self._model, block, self._context.provider, self._context.threads)
        plain = block.join.direct and not has_branch_norm(block)
        to_stream = pure and (plain if target == "sum" else target == "stream" and (plain or branch is not None))
        axis = block.axis
        now = [*([block.input] if inputs else []), *([block.hidden] if neurons else []), *more]
        count = len(now)
        passing = [block.hidden.name]
        if to_stream:
            now.append(block.join.residual)
        if not pure:
            now.append(block.output)
            passing.append(block.output.name)
        others_before = [block.join.residual] if to_stream else weight_values(block, weight) if pure else []
        before = [block.output.name, *(self._residuals.get(block.output.name, each.name) for each in others_before)]
        axes = [block.down.linear.axis if tensor is block.hidden else axis for tensor in now]
        currents = self._now.rows([tensor.name for tensor in now], axes, passing)
        if not pure:
            for values in currents:
                y = values[-1]
                yield values[:count], y, y, token_weights(block, y, [], weight)
            return
        originals = self._original.rows(before, [axis] * len(before), [block.hidden.name])
        for values, (y, *others) in zip(currents, originals, strict=True):
            t = y
            if to_stream and others[0].shape == y.shape == values[-1].shape:
                with np.errstate(invalid="ignore"):  # tokens that are not finite are left out
                    missing = others[0].astype(np.float64) - (values[-1] if target == "stream" else 0)
                    t = y + missing if branch is None else branch.towards(y, missing)
            added, beside = (y, others) if branch is None else branch.in_stream(y, others)
            yield values[:count], y, t, token_weights(block, added, beside, weight)


def _original(model: Model, context: Context) -> tuple[Model, dict[str, str]]:
    """The model that blocks are fitted towards, and output of a block → the residual that it joins there.

    That is the one before anything approximate, where it computes all that has to be compared under the same names.
    """
    if context.original is None:
        return model.copy(), {}
    residuals = {block.output.name: block.join.residual.name for block in find_ffn_blocks(context.original.copy())
                 if block.path == "main"}
    if all(any(value.name in residuals for value in (block.output, *block.sums()))
           for block in context.ledger.blocks.values() if block.path == "main"):
        return context.original.copy(), residuals
    return model.copy(), {}
