"""separate-resize: a cubic Resize of many channels becomes two products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.edit import remove_dead, take_over
from ..graph.model import Model
from ..graph.weights import InlineValues
from .base import Context, Pass, PassResult, Refused
from .exact.resized import Axis, Resized, read_resize

_FLOAT, _FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


@dataclass(frozen=True)
class SeparateResize(Pass):
    """Resize height and width by a matrix each, where many channels are resized alike by cubic interpolation.

        Y[n, c] = Resize(X[n, c])   →   Y[n, c] = R_h X[n, c] R_wᵀ       X [N, C, H, W], Y [N, C, h, w]

        R_h  = Resize(I_H) to h × H      R_wᵀ = Resize(I_W) to W × w      with the attributes of the original

    Interpolation is linear in the pixels, and each of its weights is one for the row times one for the column (ONNX's
    reference implementation of Resize, ``onnx.reference.ops.op_resize``, goes axis by axis), so what it makes of an
    identity is the matrix that does the same to anything. Sizes may be computed in the graph, as in vision transformers
    that interpolate their position embedding at every run. ONNX Runtime's cubic kernel for the CPU looks every pixel up
    in a hash table, in one thread.

    Does not fire on nearest or linear interpolation (nearest has no products, and the linear kernel is as fast: two
    products are 0.21 to 1.49 times as fast, by ``benchmarks/separate_resize.py``); with ``antialias``, which has a kernel
    of its own; on crops (``tf_crop_and_resize``), on sizes that keep the aspect ratio, on scales that are computed in the
    graph or leave a size as it is; where channels, height and width are not known, or too few or too large for it to pay;
    on other types than float32 and float16 (whose products are taken in float32, so that they are rounded once, as by
    Resize); on CUDA.

    A number that is not finite spreads over its row and column, not only over four pixels each way.
    """

    name: ClassVar[str] = "separate-resize"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Separate every Resize for which it pays, in inner graphs too."""
        fired = 0
        refused = []
        for _, graph in model.graphs():
            for node in list(graph.nodes):
                outcome = read_resize(node, model.opset, context.provider)
                if isinstance(outcome, Refused):
                    refused.append(outcome)
                elif outcome is not None:
                    _separate(model, graph, outcome)
                    fired += 1
        return self.result(fired, refused)


def _separate(model: Model, graph: gs.Graph, resized: Resized) -> None:
    node = resized.node
    build = Builder(model, graph, node.name or node.outputs[0].name, _FLOAT)
    y = node.inputs[0]
    if resized.onnx_type == _FLOAT16:
        y = build.op("Cast", y, hint="float", to=_FLOAT)
    if resized.width.changes:
        y = build.op("MatMul", y, _matrix(build, resized, resized.width, "columns"), hint="width")
    if resized.height.changes:
        y = build.op("MatMul", _matrix(build, resized, resized.height, "rows"), y, hint="height")
    if resized.onnx_type == _FLOAT16:
        y = build.op("Cast", y, hint="half", to=_FLOAT16)
    take_over(node.outputs[0], y)
    remove_dead(graph, [node])


def _matrix(build: Builder, resized: Resized, axis: Axis, hint: str) -> gs.Variable:
    """What the Resize makes of an identity: its rows resized (``[h, H]``), or its columns (``[W, w]``)."""
    zero = gs.Constant("", InlineValues(np.zeros(1, np.float32)))
    zeros = build.op("ConstantOfShape", build.integers([axis.length] * 2, f"{hint}_shape"), hint=f"{hint}_zeros", value=zero)
    identity = build.op("EyeLike", zeros, hint=f"{hint}_identity")
    rows = hint == "rows"
    roi, scales, sizes = _targets(build, resized, axis, hint, rows)
    attrs: dict[str, Any] = {key: value for key, value in resized.node.attrs.items()
                             if key not in ("axes", "keep_aspect_ratio_policy")}
    return build.op("Resize", identity, roi, scales, *sizes, hint=hint, **attrs)


def _targets(build: Builder, resized: Resized, axis: Axis, hint: str,
             rows: bool) -> tuple[gs.Tensor, gs.Tensor, list[gs.Tensor]]:
    """``roi``, ``scales`` and, where sizes are given, ``sizes`` of a Resize of one axis of a matrix."""
    none: Iterator[gs.Tensor] = (gs.Variable.empty() if build.model.opset >= 13 else  # before, inputs must be there
                                 build.constant(np.zeros(0, np.float32), f"{hint}_{name}") for name in ("roi", "scales"))
    if axis.scale is not None:
        scales = np.asarray([axis.scale, 1] if rows else [1, axis.scale], np.float32)
        return next(none), build.constant(scales, f"{hint}_scales"), []
    if axis.size is not None:
        return next(none), next(none), [build.integers([axis.size, axis.length] if rows else [axis.length, axis.size],
                                                       f"{hint}_sizes")]
    given = resized.node.inputs[3]
    size = build.op("Slice", given, build.integers([axis.place], f"{hint}_start"),
                    build.integers([axis.place + 1], f"{hint}_end"), hint=f"{hint}_size")
    kept = build.integers([axis.length], f"{hint}_length")
    both = build.op("Concat", *([size, kept] if rows else [kept, size]), hint=f"{hint}_sizes", axis=0)
    return next(none), next(none), [both]
