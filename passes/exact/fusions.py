"""Whether a rewrite would cost ONNX Runtime a fusion: tried on a copy of the part of the model around it, and asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import onnx_graphsurgeon as gs

from ...graph.edit import consumers
from ...graph.errors import InputError
from ...graph.linear import read_linear
from ...graph.model import Model
from ...graph.sort import reads
from ...runtime.executed import executed_ops
from ..base import Context

_MOST = 400  # nodes that are looked at behind a value
_LARGEST = 1 << 30  # bytes of weights that ONNX Runtime is given to answer


def what_it_costs(model: Model, around: Iterable[gs.Tensor], rewrite: Callable[[Model], bool], context: Context, *,
                  new: Sequence[str] = (), form: tuple[object, ...] = ()) -> str | None:
    """Why ``rewrite`` should not be done, in one clause: the operators that ONNX Runtime would execute more often.

    Args:
        around: values of the main graph that the rewrite is about. Only what leads to the next linears behind them is
            tried; all of the model where they are none.
        rewrite: does it on a copy of the model; says whether it could.
        new: operators that the rewrite adds one of.
        form: what else tells two rewrites apart. Those of one form, before the same operators, are asked about once.
    """
    outputs, operators = _behind(around)
    key = ("costs", form, operators)
    if key not in context.memo:
        context.memo[key] = _ask(model, outputs, rewrite, context, new)
    found: str | None = context.memo[key]
    return found


def _ask(model: Model, outputs: Sequence[str], rewrite: Callable[[Model], bool], context: Context,
         new: Sequence[str]) -> str | None:
    weights = model.session_parts(outputs, only=bool(outputs))[1]
    size = sum(values.nbytes for values in weights.values())
    if size > _LARGEST:
        return f"ONNX Runtime would have to load {size / 1e9:.1f} GB to say whether it loses a fusion"
    trial = model.copy()
    if not rewrite(trial):
        return "it could not be tried"
    try:
        before, after = (executed_ops(each, outputs=outputs, provider=context.provider, threads=1) for each in (model, trial))
    except InputError:
        return "ONNX Runtime does not load the model, so that it cannot say which fusions it would lose"
    more = after - before - Counter(new)
    if more:
        return "ONNX Runtime would lose a fusion: it executes " + ", ".join(
            f"{count} {op.partition(':')[2] or op} more" for op, count in sorted(more.items()))
    return None if after.total() <= before.total() else "ONNX Runtime would execute more nodes"


def _behind(around: Iterable[gs.Tensor]) -> tuple[list[str], tuple[str, ...]]:
    """The values where the next linears behind ``around`` end, an addition behind them included, and the operators up to
    there."""
    starts = list(around)
    pending = list(starts)
    seen = {id(tensor) for tensor in pending}
    operators: list[str] = []
    ends: dict[str, None] = {}
    while pending and len(operators) < _MOST:
        tensor = pending.pop(0)
        if not tensor.outputs:
            ends[tensor.name] = None
        for node in consumers(tensor):
            operators.append(node.op)
            linear = read_linear(node)
            if linear is not None and linear.input is tensor:
                ends[_sum(linear.output).name] = None
                continue
            for output in node.outputs:
                if output.name and id(output) not in seen:
                    seen.add(id(output))
                    pending.append(output)
    ends.update(dict.fromkeys(tensor.name for tensor in pending))
    return list(ends), tuple(operators)


def _sum(tensor: gs.Tensor) -> gs.Tensor:
    """What a residual Add right behind ``tensor`` gives, or ``tensor``."""
    readers = consumers(tensor)
    if len(readers) == 1 and readers[0].op == "Add" and any(each is tensor for each in reads(readers[0])):
        return readers[0].outputs[0]
    return tensor
