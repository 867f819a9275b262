"""What a cubic Resize does to height and width, and whether two products do it faster."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ...graph.constant import fold
from ...graph.dimensions import dimensions, element_type
from ..base import Refused

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_LONGEST = 1024  # rows or columns of an image whose identity is made when the model is loaded
_MOST_PRODUCTS = 8192  # multiply-adds for one number, which cost what one number costs the cubic kernel, and less
_NARROW = 16  # columns of a matrix below which a product gets no cheaper
_FEWEST_CHANNELS = 8  # where the two matrices are resized at every run
_LARGEST = 1 << 16  # pixels of an image whose size afterwards is not known


@dataclass(frozen=True)
class Axis:
    """Height or width.

    Attributes:
        length: before.
        size: after, or None where it is computed in the graph.
        scale: what the Resize was given instead of sizes, or None.
        place: where the size stands in the ``sizes`` of the Resize.
    """

    length: int
    size: int | None
    scale: float | None = None
    place: int = 0

    @property
    def changes(self) -> bool:
        """Whether it may have another size afterwards."""
        return self.size != self.length


@dataclass(frozen=True)
class Resized:
    """A Resize that two products can take the place of."""

    node: gs.Node
    onnx_type: int
    height: Axis
    width: Axis


def read_resize(node: gs.Node, opset: int, provider: str) -> Resized | Refused | None:
    """``node`` read as a cubic Resize, why it stays, or None where that goes without saying."""
    if node.op != "Resize" or node.domain not in (None, "", "ai.onnx") or opset < 11 or node.attrs.get("mode") != "cubic":
        return None
    if not node.inputs or not node.outputs:
        return None
    value = node.outputs[0].name
    reason = _by_attributes(node, provider)
    if reason is not None:
        return Refused(reason, value)
    shape = dimensions(node.inputs[0])
    if shape is None or len(shape) != 4 or not all(shape[1:]):
        return None if shape is not None and len(shape) != 4 else Refused(
            "channels, height and width of what is resized are not known when the model is built", value)
    onnx_type = element_type(node.inputs[0])
    if onnx_type is None or onnx_type not in _TYPES:
        return Refused("its type is not known" if onnx_type is None else "its type is neither float32 nor float16", value)
    axes = _axes(node, [dim or 0 for dim in shape])
    if axes is None or isinstance(axes, str):
        return None if axes is None else Refused(axes, value)
    height, width = axes
    if _is_constant(node, height, width) or not (height.changes or width.changes):
        return None
    reason = _by_cost((shape[0] or 1) * (shape[1] or 1), height, width)
    return Resized(node, onnx_type, height, width) if reason is None else Refused(reason, value)


def _by_attributes(node: gs.Node, provider: str) -> str | None:
    if provider != "cpu":
        return "only the CPU kernel is measured to be slower than two products"
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "it crops as well (tf_crop_and_resize)"
    if node.attrs.get("antialias", 0):
        return "with antialias ONNX Runtime has a kernel that resizes one axis after the other itself"
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    return None if policy == "stretch" else f"the size of one axis depends on the other (keep_aspect_ratio_policy={policy})"


def _axes(node: gs.Node, shape: list[int]) -> tuple[Axis, Axis] | str | None:
    """Height and width, or why they cannot be resized apart; None where the Resize only copies, or cannot run."""
    named = [axis % 4 for axis in node.attrs.get("axes") or range(4)]
    given = {name: node.inputs[place] for place, name in ((2, "scales"), (3, "sizes"))
             if len(node.inputs) > place and node.inputs[place].name and not _is_empty(node.inputs[place])}
    if len(given) != 1:
        return None
    [(kind, tensor)] = given.items()
    folded = fold(tensor)
    numbers = None if folded is None or folded.overridable else folded.load().reshape(-1)
    if numbers is None and kind == "scales":
        return "its scales are computed in the graph, and ONNX Runtime copies what keeps its size whatever the scale"
    if numbers is not None and (len(numbers) != len(named) or not np.isfinite(numbers).all()):
        return None
    if kind == "scales":
        return _scaled(shape, dict(zip(named, numbers, strict=True)))  # type: ignore[arg-type]
    sizes = dict.fromkeys(named) if numbers is None else dict(zip(named, map(int, numbers), strict=True))
    if any(sizes.get(axis) not in (None, shape[axis]) for axis in (0, 1) if shape[axis]):
        return "it resizes batch or channels too"
    height, width = (Axis(shape[axis], sizes.get(axis) if axis in sizes else shape[axis],
                          place=named.index(axis) if axis in named else 0) for axis in (2, 3))
    return (height, width) if all(each.size is None or each.size > 0 for each in (height, width)) else None


def _scaled(shape: list[int], scales: dict[int, np.float32]) -> tuple[Axis, Axis] | str | None:
    """Sizes as ONNX Runtime takes them from scales: ``⌊length · scale⌋`` in float32."""
    if any(scales.get(axis, 1) != 1 for axis in (0, 1)):
        return "it resizes batch or channels too"
    found = []
    for axis in (2, 3):
        scale = np.float32(scales.get(axis, 1))
        found.append(Axis(shape[axis], math.floor(np.float32(shape[axis]) * scale), float(scale)))
    height, width = found
    if min(height.size or 0, width.size or 0) < 1 or not (height.changes or width.changes):
        return None
    for each in found:
        if not each.changes and each.scale != 1:
            return f"the scale {each.scale:g} leaves a size as it is, and ONNX Runtime copies an image that keeps its size"
    return height, width


def _is_empty(tensor: gs.Tensor) -> bool:
    folded = fold(tensor)
    return folded is not None and 0 in folded.shape


def _is_constant(node: gs.Node, height: Axis, width: Axis) -> bool:
    """Whether ONNX Runtime computes the Resize once, when it loads the model."""
    x = fold(node.inputs[0])
    return x is not None and not x.overridable and height.size is not None and width.size is not None


def _by_cost(images: int, height: Axis, width: Axis) -> str | None:
    """Why two products would not be faster for ``images`` images, as far as is known.

    They take ``H·W/h + H`` multiply-adds for one number of the result (where ``w`` is small, as many as for 16 columns), 0.02 ns
    each; the cubic kernel takes about 160 ns. Where the sizes are computed, the matrices are resized at every run, ``h·H + w·W``
    numbers beside ``N·C·h·w``: they are the fewer ones from h = w = 4 on if ``H + W ≤ 4·N·C``.
    """
    pixels = height.length * width.length
    if height.size is not None and width.size is not None:
        if max(height.length, width.length) > _LONGEST:
            return f"an image of {height.length}×{width.length} is larger than {_LONGEST}×{_LONGEST}"
        products = pixels * max(width.size, _NARROW) / (height.size * width.size) + height.length
        return None if products <= _MOST_PRODUCTS else f"{round(products)} multiply-adds for each number would not be faster"
    if images < _FEWEST_CHANNELS or height.length + width.length > 4 * images or pixels > _LARGEST:
        return (f"{images} images of {height.length}×{width.length}, resized to what the graph computes, "
                "are too few or too large for it to pay")
    return None
