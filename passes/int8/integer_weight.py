"""One weight as integers: what is stored, and what the rounding does to the bias."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.builder import Builder
from ...graph.edit import producer, remove_dead, take_over
from ...graph.linear import Linear
from ...graph.weights import ComputedValues, Values
from .error_compensation import Spreading, compensated_codes
from .input_statistics import InputStatistics
from .weight_codes import Array, Rounding


@dataclass(eq=False)
class IntegerWeight:
    """The weight of a linear as integers.

    Attributes:
        linear: whose weight.
        rounding: how it is rounded.
        scales: ``[blocks, d_out]`` float32.
        codes: computes int8 ``[d_in, d_out]``.
        correction: what the bias loses because of the rounding, ``[d_out]``; None: nothing.
        key: equal for weights whose constants are the same; None for one of its own.
        made: constants made so far, by key.
    """

    linear: Linear
    rounding: Rounding
    scales: Array
    codes: Callable[[], Array]
    correction: Array | None
    key: tuple[object, ...] | None
    made: MutableMapping[object, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_in, d_out)``."""
        return self.linear.d_in, self.linear.d_out

    def bias(self) -> Array | None:
        """The bias ``[d_out]`` in float32, corrected; None where there is none."""
        if self.linear.bias is None and self.correction is None:
            return None
        bias = np.zeros(self.linear.d_out) if self.linear.bias is None else self.linear.bias().astype(np.float64)
        return (bias if self.correction is None else bias - self.correction).astype(np.float32)

    def put(self, build: Builder, product: gs.Tensor, hint: str) -> None:
        """Put ``product``, and the bias added to it, in the place of what the linear gives."""
        bias, old = self.bias(), producer(self.linear.output)
        if bias is not None:
            product = build.op("Add", product, build.constant(bias, f"{hint}_bias"), hint=f"{hint}_add")
        take_over(self.linear.output, product)
        remove_dead(build.graph, [old] if old is not None else [])

    def constants(self, build: Builder, hint: str) -> tuple[gs.Constant, gs.Constant]:
        """Codes ``[d_in, d_out]`` int8 and scales ``[d_out]`` float32 (one scale a column)."""

        def make() -> tuple[gs.Constant, gs.Constant]:
            stored: Values = ComputedValues(self.shape, onnx.TensorProto.INT8, self.codes)
            return (build.constant(stored, f"{hint}_weight_int8"),
                    build.constant_as(self.scales.reshape(-1), onnx.TensorProto.FLOAT, f"{hint}_weight_scale"))

        return self.shared(build, "dynamic", make)

    def shared(self, build: Builder, form: str, make: Callable[[], tuple[gs.Constant, ...]], *, inner: bool = False) -> Any:
        """What ``make`` gives, or what it gave for another linear with the same weight in the same ``form``.

        It lies in the graph that the weight lies in, so that branches and bodies which read one weight read one constant; or,
        ``inner``, in the graph that reads it.
        """
        if self.key is None:
            return make()
        home = build.graph if inner else getattr(self.linear.source, "home", None) or build.graph
        key = (form, id(home), *self.key)
        if key not in self.made:
            self.made[key] = make()
            for constant in self.made[key]:
                constant.home = home
        return self.made[key]


def integer_weight(linear: Linear, rounding: Rounding, made: MutableMapping[object, Any],
                   statistics: InputStatistics | None = None, *, spreading: Spreading | None = None,
                   correct_bias: bool = False) -> IntegerWeight | None:
    """The weight of ``linear`` as integers, or None where a number in it is not finite.

    Args:
        statistics: of the linear's input; weights the inputs where the scale of least error is looked for.
        spreading: move the error of each rounding into the inputs not rounded yet (GPTQ), this way.
        correct_bias: take the mean of what the rounding adds out of the bias; needs the mean.
    """
    weight = linear.weight().astype(np.float32)
    importance = None if statistics is None else statistics.mean_square
    scales = rounding.scales(weight, importance)
    if scales is None:
        return None
    key: tuple[object, ...] | None = None
    if linear.weight_key is not None and statistics is None:
        key = (linear.weight_key, rounding)
    chosen = scales
    if spreading is not None:
        held, chosen = compensated_codes(weight, scales, spreading, rounding)

        def codes() -> Array:
            return held
    else:
        def codes() -> Array:
            return rounding.codes(linear.weight(), chosen)
    correction = None
    if correct_bias and statistics is not None:
        rounded = codes().astype(np.float32) * rounding.spread(chosen, linear.d_in)
        correction = statistics.mean @ (rounded - weight).astype(np.float64)
    return IntegerWeight(linear, rounding, chosen, codes, correction, key, made)
