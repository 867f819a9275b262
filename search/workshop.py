"""The model after the exact passes, and copies of it with one unit rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..graph.block import FFNBlock
from ..graph.ffn import find_ffn_blocks
from ..graph.model import Model
from ..graph.narrow import why_not_narrow
from ..passes.base import Context, Pass
from ..passes.blocks import Blocks
from ..passes.factorize_ffn import FactorizeFFN
from ..passes.fitting.evidence import Evidence, Streams
from ..passes.fitting.measure import unmeasurable
from ..passes.fitting.neuron_fit import NeuronFit
from ..passes.fitting.neuron_selection import Indices
from ..passes.int8.other_linears import other_groups
from ..passes.ledger import Ledger
from ..passes.plan import Plan
from ..passes.remove_ffn import RemoveFFN
from ..passes.runner import run_plan
from ..passes.slim_ffn import SlimFFN
from ..runtime import Feeds
from .candidates import HEAD, OTHERS, Candidate, block_candidates, compensated, exact_passes, other_candidates, quantizing

_ENOUGH_FOR_A_MEAN = 8  # feeds; also for the largest numbers of channels


class Workshop:
    """Makes the models whose drift and latency are measured.

    Attributes:
        original: the model as it is in the file.
        base: the same after the exact passes.
        blocks: index in the file → block in ``base``.
        feeds: that fits are made to.
        fired: exact passes that did something.
        last: exact passes that end every plan, as they make this model faster here.
    """

    def __init__(self, path: Path, fit: Feeds, target: str, threads: int | None,
                 progress: Callable[[str], None] = lambda message: None) -> None:
        self.original = Model.load(path)
        self.base = Model.load(path)
        self.target, self.threads, self.progress = target, threads, progress
        self.feeds = fit
        self._survivors: tuple[int, dict[bool, dict[int, Indices]]] = -1, {}
        ledger = Ledger(self.base)
        exact = exact_passes()
        results = run_plan(self.base, Plan(tuple(exact)), provider=target, threads=threads, progress=progress,
                           after=lambda done: ledger.refresh(exact[done - 1].name))
        self.fired = sum(result.fired for result in results)
        self.last: tuple[Pass, ...] = ()
        self._finished: tuple[tuple[Pass, ...], Model] | None = None
        self.blocks: dict[int, FFNBlock] = ledger.blocks

    def candidates(self, few: bool = False) -> dict[int, list[Candidate]]:
        """Unit → what may become of it, as far as is known before it is tried; to keep it first."""
        found = {}
        for index, block in self.blocks.items():
            able = _able(self.base, block)
            found[index] = [each for each in block_candidates(block, self.target, few=few)
                            if not (each.fitted or each.removed) or able]
        better = bool(self.blocks) and all(compensated(block, few) for block in self.blocks.values())
        heads, _ = other_groups(self.base, self.blocks.values(), "head")
        return {**found, **{unit: other_candidates(self.target, better) for unit in ([OTHERS, HEAD] if heads else [OTHERS])}}

    def evidence(self, units: Sequence[int], *, neurons: bool = True,
                 late: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, Evidence]]:
        """Moments for the fits of blocks, one after the other, all on the model as it is.

        Without those of ``neurons`` they are enough for an affine map alone.

        Raises:
            OutOfTimeError: it was ``late``.
        """
        with ExitStack() as stack:
            context = self._context(self.base)
            streams = stack.enter_context(Streams(self.base, context))
            for unit in [index for index in self.blocks if index in units]:
                self.progress(f"moments of {'' if neurons else 'the input of '}block {unit}")
                yield unit, streams.evidence(self.blocks[unit], inputs=True, neurons=neurons, weight="auto", target="stream",
                                             as_read=True, late=late)

    def fit(self, unit: int, form: Candidate, evidence: Evidence) -> NeuronFit:
        """What ``slim-ffn`` would put in the place of a block; neurons for all widths leave in one go."""
        each, block = SlimFFN(multiple=1, affine=not form.bare), self.blocks[unit]
        if form.bare:
            evidence = evidence.without_inputs()
        if not form.neurons:
            return each.fit(block, evidence, 0)
        if self._survivors[0] != unit:
            self._survivors = unit, {}
        known = self._survivors[1].setdefault(form.bare, {})
        if form.neurons not in known:
            widths = {one.neurons for one in block_candidates(block, self.target) if one.neurons and one.bare == form.bare}
            known |= each.survivors(block, evidence, sorted({form.neurons, *widths}))
        return each.fit(block, evidence, form.neurons, known[form.neurons])

    def stand_in(self, unit: int, form: Candidate) -> NeuronFit:
        """Something of the same shape that was not fitted, to be timed."""
        block, width = self.blocks[unit], form.neurons or 0
        random = np.random.default_rng(0)
        affine = None if form.bare else random.standard_normal((block.d_model, block.d_out)) * 0.01
        return NeuronFit(np.arange(width), random.standard_normal((width, block.d_out)) * 0.01, affine, np.zeros(block.d_out),
                         0.0, 0.0)

    def rewritten(self, changes: Mapping[int, Candidate], fits: Mapping[int, NeuronFit], timed: bool = False) -> Model | None:
        """A copy of ``base`` with units rewritten; None where a pass refuses one of them.

        Args:
            fits: for the units that are left with some neurons.
            timed: only the shapes of the weights matter.

        Raises:
            InputError: ONNX Runtime fails at what a pass measures.
        """
        trial = self.base.copy()
        for unit, each in changes.items():
            if each.neurons is not None:
                block = self.find(trial, unit)
                if block is None:
                    return None
                block.settle()
                SlimFFN().rewrite(trial, block, fits[unit], self._context(trial))
            elif each.ratio:
                block = self.find(trial, unit)
                if block is None or not FactorizeFFN(Blocks((block.index,)), ratio=each.ratio, whiten=not timed).run(
                        trial, self._context(trial)).fired:
                    return None
            elif each.removed:
                block = self.find(trial, unit)
                if block is None or not RemoveFFN(Blocks((block.index,))).run(trial, self._context(trial, few=True)).fired:
                    return None
        for form in dict.fromkeys(each.form for each in changes.values() if each.form):
            units = [unit for unit, each in changes.items() if each.form == form]
            outside = [unit for unit in units if unit in (OTHERS, HEAD)]
            found = [self.find(trial, unit) for unit in units if unit not in outside]
            indices = [block.index for block in found if block is not None]
            if not outside and not indices:
                continue  # a block of one affine map is among the other linears
            rounding = quantizing(form, self.target, [*outside, *indices], timed=timed)
            if not rounding.run(trial, self._context(trial, few=True)).fired:
                return None
        return trial

    def finished_base(self) -> Model:
        """``base`` after the passes that end every plan; not to be rewritten."""
        if self._finished is None or self._finished[0] != self.last:
            self._finished = self.last, self.finished(self.base)
        return self._finished[1]

    def finished(self, model: Model) -> Model:
        """A copy of ``model`` after the passes that end every plan."""
        trial = model.copy()
        run_plan(trial, Plan(self.last), fit=self.feeds, provider=self.target, threads=self.threads, progress=self.progress)
        return trial

    def find(self, model: Model, unit: int) -> FFNBlock | None:
        """The block of ``base`` in a copy of it, also where an affine map was put beside it."""
        ours = self.blocks[unit]
        return next((block for block in find_ffn_blocks(model) if block.path == ours.path and ours.output.name in
                     (block.output.name, *(value.name for value in block.sums()))), None)

    def _context(self, model: Model, few: bool = False) -> Context:
        fit = self.feeds[:_ENOUGH_FOR_A_MEAN] if few else self.feeds
        return Context(fit, fit, self.target, self.threads, ledger=Ledger(model), progress=self.progress)


def _able(model: Model, block: FFNBlock) -> bool:
    """Whether something can be fitted in the block's place."""
    return why_not_narrow(block) is None and unmeasurable(model, block) is None

