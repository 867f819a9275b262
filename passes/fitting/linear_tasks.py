"""Each linear of a block as a task of its own: what it has to give, and by what its error counts.

    minimize Σ_t w_t ‖t_t − x_t Ŵ − c‖²  =  tr (W* − Ŵ)ᵀ G (W* − Ŵ) + what no Ŵ can help

    up, gate:  t = x W + b, so W* = W
    down:      t as in :mod:`evidence`; W* = argmin Σ_t w_t ‖t_t − h_t W* − c‖² + λ Σ_i E[h_i²] ‖W*_i − W_i‖²

G holds the weighted second moments of x: about its mean where the linear has a bias, for c then takes the mean, else about zero.
The down projection is looked at after up and gate were rewritten, so that it also makes good what they do wrong now.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.block import OVERRIDABLE, FFNBlock
from ...graph.builder import Builder
from ...graph.edit import producer, remove_dead, take_over
from ...graph.linear import Linear
from ...graph.model import Model
from ...runtime import Scatter
from ..base import Context, Refused
from ..exact.cost import released_bytes
from .evidence import Evidence, Target
from .measure import unmeasurable
from .neuron_fit import Features, choose_ridge
from .shrunk import Factor, Stored, multiply, product, store

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Task:
    """What takes the place of a linear should give what ``x W* + c`` gives.

    Attributes:
        linear: the one to be replaced.
        wanted: W* ``[d_in, d_out]``, float64.
        gram: G ``[d_in, d_in]``; None where nothing was measured: every entry of W* counts the same.
        bias: c of W* ``[d_out]``; None where the linear has none.
        mean: E[x], by which c follows from Ŵ; None where c stays as it is.
    """

    linear: Linear
    wanted: Array
    gram: Array | None = None
    bias: Array | None = None
    mean: Array | None = None

    def bias_of(self, matrix: Array) -> Array | None:
        """c of ``matrix``."""
        if self.bias is None or self.mean is None:
            return self.bias
        return np.asarray(self.bias + self.mean @ (self.wanted - matrix))


Compress = Callable[[Task], "Sequence[Factor] | None"]  # whose product is Ŵ, or None to leave the linear alone


def why_not_apart(block: FFNBlock) -> Refused | None:
    """Why the linears of ``block`` cannot be replaced one by one, or None."""
    reason = None
    linears = block.linears()
    if block.experts != 1 or any(linear.gathered or linear.packed for linear in linears):
        reason = "its experts are packed in one weight"
    elif block.quantized:
        reason = "its weights are stored as integers: run this pass before the one that quantizes"
    elif block.overridable:
        reason = OVERRIDABLE
    elif any(linear.fused_activation for linear in linears):
        reason = "its activation is fused into the projection: export without ONNX Runtime's own optimization"
    return None if reason is None else Refused(reason, block.output.name)


@dataclass(frozen=True)
class Linearwise:
    """Replaces the linears of blocks, one after the other.

    A weight that several of the blocks read is fitted once, on what the first of them reads, and stays one weight.

    Args:
        key: of the pass; equal for two runs that would do the same.
        blocks: all that are to be rewritten.
        measured: there are ``context.streams`` to take G from.
        weight, target: see :mod:`token_weights` and :mod:`evidence`.
        centred: biases take the mean of what is lost.
    """

    model: Model
    context: Context
    key: Hashable
    blocks: Sequence[FFNBlock]
    measured: bool
    weight: str
    target: Target
    centred: bool = True

    def replace(self, block: FFNBlock, compress: Compress) -> Refused | None:
        """Replace what ``compress`` gives something for; refused where that is nothing."""
        refusal = self._why_not(block)
        if refusal is not None:
            return refusal
        evidence = self._evidence(block, hidden=False)
        if isinstance(evidence, Refused):
            return evidence
        down = block.down.linear
        first = [linear for linear in block.linears() if linear is not down]
        replaced = [self._one(block, self._task(block, linear, evidence), compress) for linear in first]
        self._rewritten(linear.output.name for linear in first)
        evidence = self._evidence(block, hidden=True)
        if not isinstance(evidence, Refused):
            replaced.append(self._one(block, self._task(block, down, evidence), compress))
        self._rewritten([block.output.name])
        return None if any(replaced) else Refused("nothing would get smaller", block.output.name)

    def tasks(self, block: FFNBlock) -> list[Task]:
        """The tasks of all its linears as they are now; none where no token reached the block."""
        found: list[Task] = []
        for hidden in (False, True):
            evidence = self._evidence(block, hidden=hidden)
            if not isinstance(evidence, Refused):
                found += [self._task(block, linear, evidence) for linear in block.linears()
                          if (linear is block.down.linear) == hidden]
        return found

    def _rewritten(self, names: Iterable[str]) -> None:
        for name in names if self.measured else ():
            assert self.context.streams is not None
            self.context.streams.rewritten(name)

    def _evidence(self, block: FFNBlock, *, hidden: bool) -> Evidence | Refused | None:
        """What the feeds say about the input of the block, or of its down projection."""
        if not self.measured:
            return None
        assert self.context.streams is not None
        found = self.context.streams.evidence(block, inputs=not hidden, neurons=hidden, weight=self.weight, target=self.target)
        return found if found.rows else found.finite.why_none(block.input.name)

    def _task(self, block: FFNBlock, linear: Linear, evidence: Evidence | None) -> Task:
        """The task of ``linear``, from the moments of what it reads."""
        prior = linear.weight().astype(np.float64)
        bias = None if linear.bias is None else linear.bias().astype(np.float64)
        if evidence is None:
            return Task(linear, prior, None, bias)
        tied = len(self._readers(linear)) > 1
        down = linear is block.down.linear
        centred = self.centred and not tied and (block.down.has_bias if down else bias is not None)
        if down and not tied and self.target != "own":
            task = fitted_task(block, prior, evidence, centred)
            if task.bias is None:
                return Task(linear, task.wanted, task.gram, bias)
            extra = [each().reshape(-1) for each in block.down.extra_bias]  # stays where it is, behind the linear
            return Task(linear, task.wanted, task.gram, task.bias - np.sum(extra, axis=0) if extra else task.bias, task.mean)
        moments = _features(evidence.everything(), prior, centred)
        return Task(linear, prior, moments.ff, bias, moments.mean_f if centred else None)

    def _one(self, block: FFNBlock, task: Task, compress: Compress) -> bool:
        linear = task.linear
        made = self.context.memo
        key = None if linear.weight_key is None else (self.key, id(block.graph), linear.weight_key)
        known = made.get(key) if key is not None else None
        if known is not None:
            _put(self.model, block, linear, known[0], task.bias)
            return True
        matrices = compress(task)
        if matrices is None:
            return False
        made_of = put_matrices(self.model, block, linear, matrices, task.bias_of(product(matrices)))
        if key is not None and made_of:
            made[key] = (made_of, linear.source)  # the source, too: its identity is part of the key
        return True

    def _readers(self, linear: Linear) -> list[Linear]:
        """The linears of all blocks that read the weight of ``linear``."""
        if linear.weight_key is None:
            return [linear]
        return [other for block in self.blocks for other in block.linears() if other.weight_key == linear.weight_key]

    def _why_not(self, block: FFNBlock) -> Refused | None:
        if self.measured:
            refusal = unmeasurable(self.model, block)
            if refusal is not None:
                return refusal
        for linear in block.linears():
            key = (self.key, id(block.graph), linear.weight_key)
            if key not in self.context.memo and not released_bytes(*self._readers(linear)):
                return Refused("a weight is shared with something that stays, so that the file would grow", linear.output.name)
        return None


def _features(moments: Scatter, prior: Array, centred: bool) -> Features:
    """Moments of [f, t], about their means or about zero."""
    found = Features.of(moments, prior, 0)
    if centred:
        return found
    f, t = found.mean_f, found.mean_t
    return Features(found.ff + np.outer(f, f), found.ft + np.outer(f, t), found.tt + float(t @ t), 0 * f, 0 * t, 0, prior)


def fitted_task(block: FFNBlock, prior: Array, evidence: Evidence, centred: bool) -> Task:
    """The task of the down projection as a whole, all its constants included, towards the target that ``evidence`` holds.

    Args:
        prior: the matrix that it has now, ``[d_ff, d_out]``, which the one wanted is held near to. λ is chosen on tokens held
            out.
    """
    neurons = np.arange(len(prior))
    moments = _features(evidence.everything(), prior, centred)
    halves = bool(evidence.fit.rows and evidence.held_out.rows)
    fit = _features(evidence.fit, prior, centred) if halves else moments
    held_out = _features(evidence.held_out, prior, centred) if halves else None
    ridge, _ = choose_ridge(fit, held_out, neurons)
    matrix = moments.solve(neurons, ridge)
    if not centred:
        return Task(block.down.linear, matrix, moments.ff)
    return Task(block.down.linear, matrix, moments.ff, np.asarray(moments.mean_t - moments.mean_f @ matrix), moments.mean_f)


def change_hidden(model: Model, block: FFNBlock, value: gs.Tensor, matrix: Array, context: Context) -> None:
    """Let the down projection multiply ``value`` (neurons, as many as before) by ``matrix`` from now on, with its own bias."""
    hidden, down = block.hidden, block.down.linear
    put_matrices(model, block, down, [matrix], None if down.bias is None else down.bias())
    old = producer(hidden)
    take_over(hidden, value)
    hidden.shape = None
    remove_dead(block.graph, [old] if old is not None else [])
    if context.streams is not None:
        context.streams.rewritten(hidden.name)


def put_matrices(model: Model, block: FFNBlock, linear: Linear, matrices: Sequence[Factor],
                 bias: Array | None) -> list[Stored]:
    """``((x M₁) M₂ …) + b`` in the place of ``linear``; what they are stored in (nothing where they are convolutions)."""
    build = Builder(model, block.graph, block.name, linear.onnx_type)
    if linear.axis == -1:
        stored = [store(build, matrix, _hint(linear)) for matrix in matrices]
        _put(model, block, linear, stored, bias)
        return stored
    value = linear.input
    for number, matrix in enumerate(matrices):
        last = number == len(matrices) - 1
        dense = product([matrix])
        value = build.linear(value, dense, bias if last else None, axis=linear.axis, hint=_hint(linear))
    _take(block, linear, value)
    return []


def _hint(linear: Linear) -> str:
    return linear.node.name.rsplit("/", 1)[-1] or linear.kind


def _put(model: Model, block: FFNBlock, linear: Linear, factors: Sequence[Stored], bias: Array | None) -> None:
    build = Builder(model, block.graph, block.name, linear.onnx_type)
    value, hint = linear.input, _hint(linear)
    for stored in factors:
        value = multiply(build, value, stored, hint)
    if bias is not None:
        value = build.op("Add", value, build.constant(bias, f"{hint}_bias"), hint=f"{hint}_add")
    _take(block, linear, value)


def _take(block: FFNBlock, linear: Linear, value: gs.Tensor) -> None:
    old = producer(linear.output)
    take_over(linear.output, value)
    remove_dead(block.graph, [old] if old is not None else [])
