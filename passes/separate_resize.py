"""separate-resize: many images resized at once become two products with one small matrix each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..graph.builder import Builder
from ..graph.constant import fold
from ..graph.edit import remove_dead, take_over
from ..graph.errors import InputError
from ..graph.model import Model
from ..graph.types import FLOATS, onnx_type_of
from ..runtime import open_session, synthetic_feeds
from .base import Context, Pass, PassResult, Refused

_FEWEST = 8  # images (batch · channels), below which the two small ones cost as much
_LONGEST = 512  # sides of an image, beyond which the products cost as much
_AXES = (2, 3)


@dataclass(frozen=True)
class SeparateResize(Pass):
    """Put two products in the place of a cubic Resize of many images of one size.

        Y[n, c] = resize(X[n, c])   →   Y[n, c] = R_h X[n, c] R_wᵀ
        R_h = resize(I_H, rows alone) [h, H],   R_wᵀ = resize(I_W, columns alone) [W, w]

    A cubic Resize is a linear function of the image, along one axis after the other, so that what it does along an axis is a
    matrix: what it makes of the identity. ONNX Runtime resizes image after image, number after number, in one thread (14 ns
    for each of 16 terms of each number); a position table ``[1, 384, 37, 37]`` that a vision transformer fits to the size of
    its input takes a seventh of the whole run. Of the identities, of H² and W² numbers, it is done in no time, for sizes or
    scales that are computed in the graph as well, and the rest are products. The same but for the order of sums.

    Fires on the CPU, on ``[batch, channels, H, W]`` of which batch · channels ≥ 8 and H, W ≤ 512; where shapes are computed,
    the model is run once (on the first of the feeds, or a made-up one) to see them. Does not fire on other modes (nearest is
    no linear function; of linear, the kernel works on many images at once), nor with ``tf_crop_and_resize`` or a
    ``keep_aspect_ratio_policy``, by which one axis depends on the other, nor on integers.
    Source: the definition of Resize in the ONNX operator specification (the cubic kernel is that of Keys, 1981).
    """

    name: ClassVar[str] = "separate-resize"
    exact: ClassVar[bool] = True

    def run(self, model: Model, context: Context) -> PassResult:
        """Rewrite each, or say why not."""
        found = [(graph, node) for _, graph in model.graphs() for node in graph.nodes
                 if node.op == "Resize" and node.attrs.get("mode", "nearest") == "cubic"]
        images = _images(model, [node.inputs[0] for _, node in found], context)
        fired = 0
        refused = []
        for graph, node in found:
            reason = _why_not(node, images.get(node.inputs[0].name), context)
            if reason is not None:
                refused.append(Refused(reason, node.outputs[0].name))
                continue
            _Separated(Builder(model, graph, node.name or "/resize", images[node.inputs[0].name].onnx_type), node).write()
            remove_dead(graph, [node])
            fired += 1
        return self.result(fired, refused)


@dataclass(frozen=True)
class _Images:
    """What is resized: its shape, in one run at least, and the type of its numbers."""

    shape: tuple[int, ...]
    onnx_type: int


def _images(model: Model, tensors: Sequence[gs.Tensor], context: Context) -> dict[str, _Images]:
    """Those whose shape is known, or seen in a run, by name."""
    found, unknown = {}, []
    for tensor in tensors:
        folded = fold(tensor)
        if folded is not None:
            found[tensor.name] = _Images(folded.shape, folded.onnx_type)
        elif tensor.shape is not None and isinstance(tensor.dtype, int) and all(isinstance(dim, int) for dim in tensor.shape):
            found[tensor.name] = _Images(tuple(tensor.shape), tensor.dtype)
        else:
            unknown.append(tensor.name)
    if unknown and context.provider == "cpu":
        with contextlib.suppress(InputError):
            context.progress("separate-resize: shapes")
            session = open_session(model, threads=context.threads, outputs=unknown, only=True, lean=True)
            feed = context.fit[0] if context.fit else synthetic_feeds(model)[0]
            taken = {spec.name for spec in session.inputs}
            for name, value in session.run({key: value for key, value in feed.items() if key in taken}, unknown).items():
                found[name] = _Images(value.shape, onnx_type_of(value.dtype))
            session.close()
    return found


def _why_not(node: gs.Node, images: _Images | None, context: Context) -> str | None:
    if context.provider == "cuda":
        return "CUDA resizes all images at once"
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "it crops as well"
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return "one side follows from the other"
    if images is None:
        return "the size of the images is not known"
    if len(images.shape) != 4 or tuple(_axes(node)) not in (_AXES, (0, 1, 2, 3)):
        return "it does not resize the last two of four axes"
    if images.onnx_type not in FLOATS:
        return "its numbers are no floating-point numbers"
    count = math.prod(images.shape[:2])
    if count < _FEWEST:
        return f"two small images would cost as much as the {count} that there are"
    if max(images.shape[2:]) > _LONGEST:
        return f"images of {images.shape[2]}×{images.shape[3]} would cost more as products"
    return None


def _axes(node: gs.Node) -> list[int]:
    given = node.attrs.get("axes")
    return [0, 1, 2, 3] if given is None else [int(axis) % 4 for axis in given]


@dataclass(frozen=True)
class _Separated:
    """Writes the two products."""

    build: Builder
    node: gs.Node

    def write(self) -> None:
        """Let them give what the Resize gave."""
        columns = self.build.op("MatMul", self.node.inputs[0], self._matrix(3), hint="columns")
        take_over(self.node.outputs[0], self.build.op("MatMul", self._matrix(2), columns, hint="rows"))

    def _matrix(self, axis: int) -> gs.Tensor:
        """What the Resize does along ``axis``: R_h ``[h, H]`` along the rows, R_wᵀ ``[W, w]`` along the columns."""
        build, node = self.build, self.node
        which = "height" if axis == 2 else "width"
        side = self._part(self._shape, axis, f"{which}_before")
        one = build.integers([1], f"{which}_one")
        identity = build.op("EyeLike", build.op("ConstantOfShape", build.op("Concat", side, side, hint=f"{which}_square", axis=0),
                                                hint=f"{which}_zeros"), hint=f"{which}_identity")
        if build.onnx_type != onnx.TensorProto.FLOAT:
            identity = build.op("Cast", identity, hint=f"{which}_cast", to=build.onnx_type)
        image = build.op("Reshape", identity, build.op("Concat", one, one, side, side, hint=f"{which}_image_shape", axis=0),
                         hint=f"{which}_image")
        by_sizes = len(node.inputs) > 3 and bool(node.inputs[3].name)
        part = self._part(node.inputs[3 if by_sizes else 2], _axes(node).index(axis), which)
        same = build.constant_as(np.ones(1), onnx.TensorProto.FLOAT, f"{which}_same")
        first, kept = (one, side) if by_sizes else (same, same)
        target = build.op("Concat", first, first, *((part, kept) if axis == 2 else (kept, part)), hint=f"{which}_target", axis=0)
        attrs = {key: value for key, value in node.attrs.items() if key != "axes"}
        resized = build.value(f"{which}_resized")
        build.nodes("Resize", [image, *node.inputs[1:3 if by_sizes else 2], target], [resized], hint=f"{which}_resize", **attrs)
        ends = [build.integers([-1], f"{which}_rest"), side] if axis == 2 else [side, build.integers([-1], f"{which}_rest")]
        return build.op("Reshape", resized, build.op("Concat", *ends, hint=f"{which}_shape", axis=0), hint=f"{which}_matrix")

    @cached_property
    def _shape(self) -> gs.Tensor:
        return self.build.op("Shape", self.node.inputs[0], hint="shape")

    def _part(self, several: gs.Tensor, at: int, hint: str) -> gs.Tensor:
        return self.build.op("Slice", several, self.build.integers([at], f"{hint}_start"),
                             self.build.integers([at + 1], f"{hint}_end"), hint=hint)
