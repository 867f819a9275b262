"""What quantize-ffn does to linears, once it is settled which: smoothing, statistics, integers in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.model import Model
from ..base import Context
from .dynamic_int8 import quantize_group
from .error_compensation import Spreading
from .input_statistics import InputStatistics, held_at_once, input_statistics
from .integer_weight import IntegerWeight, integer_weight
from .linear_groups import LinearGroup, is_matrix, is_plain
from .nbits import quantize_nbits
from .row_choice import measure_rows
from .smooth import can_divide_hidden, counterweights, factors, smooth
from .units import Unit
from .weight_codes import Rounding
from .weight_only_int8 import StoredWeight, dequantize_matrix, dequantize_stored, stored_weight

Form = Literal["dynamic", "nbits", "weight-only"]


@dataclass(frozen=True)
class Recipe:
    """How linears are quantized.

    Attributes:
        form: what is put in their place.
        rounding: of their weights.
        rows: which groups get a scale for each row of the activations.
        smooth: by what large channels are known: ``norm`` or ``feeds``; strength: the α of SmoothQuant.
        compensate: move rounding errors into inputs not rounded yet (GPTQ); correct_bias: take the mean error out of the bias.
        int8_arithmetic: MatMulNBits may quantize the activations.
    """

    form: Form
    rounding: Rounding
    rows: Literal["auto", "true", "false"] = "auto"
    smooth: Literal["none", "norm", "feeds"] = "norm"
    strength: float = 1.0
    compensate: bool = False
    correct_bias: bool = False
    int8_arithmetic: bool = True

    @property
    def measures(self) -> bool:
        """Whether statistics of the inputs are needed after smoothing."""
        return self.compensate or self.correct_bias or (self.rounding.scale == "mse" and self.smooth == "feeds")


Known = dict[int, InputStatistics | None]
"""The identity of a value that is read → what the feeds tell of it."""


def smooth_units(model: Model, units: Sequence[Unit], recipe: Recipe, context: Context) -> Known:
    """Take large channels out of what the groups read, by exact algebra on the float model.

    Returns:
        The statistics that ``recipe.measures``, of what the groups read now, where they were to be had without another run
        through the feeds; else nothing.
    """
    if recipe.smooth == "none":
        return {}
    groups = [group for unit in units for group in unit.groups if is_plain(group)]
    known: Known = {}
    lasting = recipe.measures and (not recipe.compensate or held_at_once(_values(model, groups)))
    if recipe.smooth == "feeds" and recipe.form == "dynamic":
        known = dict(_measured(model, groups, context, gram=recipe.compensate and lasting))
    for unit in units:
        for group in reversed(unit.groups):  # what is divided by in the up projection must be known before that is smoothed
            if not is_plain(group) or (group.down and not (recipe.smooth == "feeds" and can_divide_hidden(group))):
                continue
            scale, statistics = None, known.get(id(group.input))
            if recipe.form == "dynamic":
                scale = factors(group, recipe.strength, statistics)
                group.smoothed = scale is not None
            if scale is None and not group.down:
                scale = counterweights(group)
            if scale is not None:
                unit.smoothed.append(smooth(model, group, scale))
                known[id(group.input)] = None if statistics is None else statistics.divided(scale)
    if recipe.smooth == "feeds" and recipe.form == "dynamic" and recipe.rows == "auto":
        measure_rows(model, groups, context)
    return known if lasting else {}


def quantize_units(model: Model, units: Sequence[Unit], recipe: Recipe, context: Context,
                   known: Known) -> Iterator[tuple[Unit, str | None]]:
    """Quantize the units one after the other; each comes with why it was left alone, or None.

    Args:
        known: what ``smooth_units`` gave.
    """
    statistics = dict(known)
    waiting = list(units)
    if recipe.measures and not known:
        groups = [group for unit in units for group in unit.groups if is_plain(group)]
        for key, found in _measured(model, groups, context, gram=recipe.compensate):
            statistics[key] = found
            while waiting and all(id(group.input) in statistics for group in waiting[0].groups if is_plain(group)):
                unit = waiting.pop(0)
                yield unit, _quantize(model, unit, recipe, statistics, context)
                for group in unit.groups:
                    statistics[id(group.input)] = None  # its Gram matrix is no longer needed
    for unit in waiting:
        yield unit, _quantize(model, unit, recipe, statistics, context)


def _measured(model: Model, groups: Sequence[LinearGroup], context: Context,
              gram: bool) -> Iterator[tuple[int, InputStatistics | None]]:
    assert context.fit is not None
    for tensor, found in input_statistics(model, _values(model, groups), context.fit, context, gram=gram):
        yield id(tensor), found
    for group in groups:
        if group.graph is not model.graph:  # ONNX Runtime gives no values out of a subgraph
            yield id(group.input), None


def _values(model: Model, groups: Sequence[LinearGroup]) -> list[tuple[gs.Tensor, int]]:
    """What the groups of the main graph read, and how wide it is."""
    return [(group.input, group.d_in) for group in groups if group.graph is model.graph]


def _quantize(model: Model, unit: Unit, recipe: Recipe, statistics: Mapping[int, InputStatistics | None],
              context: Context) -> str | None:
    made: MutableMapping[object, Any] = context.memo
    if not unit.plain:
        return _quantize_stored(model, unit, recipe)
    weights: list[list[IntegerWeight]] = []
    for group in unit.groups:
        found = []
        rounding = recipe.rounding.fitted(group.d_in)
        known = statistics.get(id(group.input))
        gram = None if known is None or not recipe.compensate else known.gram
        spreading = None if gram is None else Spreading.of(gram, rounding)
        for linear in group.linears:
            weight = integer_weight(linear, rounding, made, known, spreading=spreading, correct_bias=recipe.correct_bias)
            if weight is None:
                return "a weight is not finite"
            found.append(weight)
        weights.append(found)
    for group, found in zip(unit.groups, weights, strict=True):
        build = Builder(model, group.graph, group.name, group.onnx_type)
        if recipe.form == "dynamic":
            quantize_group(model, group, found, _by_rows(group, recipe))
            continue
        for linear, weight in zip(group.linears, found, strict=True):
            if recipe.form == "nbits":
                quantize_nbits(build, linear, weight, recipe.int8_arithmetic)
            else:
                dequantize_matrix(build, linear, weight)
    return None


def _by_rows(group: LinearGroup, recipe: Recipe) -> bool:
    """Whether each row gets a scale of its own."""
    if recipe.rows != "auto":
        return recipe.rows == "true"
    return group.loud if group.loud is not None else group.down or not group.smoothed


def _quantize_stored(model: Model, unit: Unit, recipe: Recipe) -> str | None:
    """Convolutions and packed experts have no integer kernel of this kind: their weights are stored as int8."""
    largest = recipe.rounding.largest if recipe.rounding.bits == 8 else 127
    columns = Rounding(largest)
    jobs: list[tuple[LinearGroup, int, StoredWeight | IntegerWeight]] = []
    for group in unit.groups:
        for number, linear in enumerate(group.linears):
            found: StoredWeight | IntegerWeight | str | None
            found = integer_weight(linear, columns, {}) if is_matrix(linear) else stored_weight(linear, largest)
            if found is None or isinstance(found, str):
                return found or "a weight is not finite"
            jobs.append((group, number, found))
    for group, number, found in jobs:
        build = Builder(model, group.graph, group.name, group.onnx_type)
        if isinstance(found, StoredWeight):
            dequantize_stored(build, group.linears[number], found, largest)
        else:
            dequantize_matrix(build, group.linears[number], found)
    return None


