"""Pictures that the feeds do not hold, made of theirs: the model itself says what the right answer is.

A varied picture is mirrored or not; most are turned, drawn out or shrunk, what lies outside being mirrored in; of half
the colours change; some are mixed with another. What limits a fit is not the number of patches but of different pictures.

Source: random crops and mirrors, arXiv 1409.4842; mixing, arXiv 1710.09412.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...graph.edit import consumers
from ...graph.model import Model
from ...runtime import Feeds

Array = npt.NDArray[Any]
_COLOURS = (1, 3, 4)
_ARITHMETIC = ("Add", "Cast", "Div", "Identity", "Mul", "Pad", "Resize", "Sub", "Transpose")
_NODES = 64
_SMALLEST = 16  # pixels of a side
_DRAWN = 0.8  # of the pictures
_SCALES = 0.4, 1.25  # of a side that is seen
_TURN = 0.35  # radians, standard deviation
_COLOURED = 0.5  # of the pictures
_CONTRAST, _SHIFT = 0.4, 0.4  # at most, of a colour; in standard deviations of the picture
_MIXED = 0.3  # of the pictures


class VariedPictures:
    """Makes them.

    Args:
        model: says which inputs are pictures: what a convolution reads, of a floating type, [rows, colours, height, width] or
            colours last.
        feeds: whose pictures.

    Attributes:
        any: whether there are pictures.
    """

    def __init__(self, model: Model, feeds: Feeds) -> None:
        self._feeds = feeds
        self._colours: dict[str, int] = {}
        for tensor in model.graph.inputs:
            arrays = (feed.get(tensor.name) for feed in feeds) if _is_convolved(tensor) else iter(())
            array = next((each for each in arrays if isinstance(each, np.ndarray)), None)
            if array is not None and array.dtype.kind == "f" and array.ndim == 4:
                for colours, height, width in ((1, 2, 3), (3, 1, 2)):
                    if array.shape[colours] in _COLOURS and min(array.shape[height], array.shape[width]) >= _SMALLEST:
                        self._colours.setdefault(tensor.name, colours - 1)
        self.any = bool(self._colours)

    def of(self, feed: Mapping[str, Any], random: np.random.Generator, *, mix: bool = True) -> dict[str, Any]:
        """A feed like ``feed`` with other pictures in it.

        Args:
            mix: some are mixed with pictures of other feeds.
        """
        found = dict(feed)
        for name, colours in self._colours.items():
            if _has_rows(feed.get(name)):
                made = np.stack([self._varied(name, np.moveaxis(picture, colours, 0), random, mix) for picture in feed[name]])
                found[name] = np.ascontiguousarray(np.moveaxis(made, 1, colours + 1), feed[name].dtype)
        return found

    def _varied(self, name: str, picture: Array, random: np.random.Generator, mix: bool) -> Array:
        made = _drawn(picture, random)
        if mix and random.random() < _MIXED:
            others = self._feeds[int(random.integers(len(self._feeds)))].get(name)
            if others is not None and _has_rows(others):
                other = np.moveaxis(others[random.integers(len(others))], self._colours[name], 0)
                if other.shape == picture.shape:
                    part = 0.5 * random.random()
                    made = (1 - part) * made + part * _drawn(other, random)
        if random.random() < _COLOURED:
            size = (len(made), 1, 1)
            made = made * random.uniform(1 - _CONTRAST, 1 + _CONTRAST, size) + made.std() * random.uniform(-_SHIFT, _SHIFT, size)
        return made


def _has_rows(value: Any) -> bool:
    return isinstance(value, np.ndarray) and len(value) > 0


def _is_convolved(tensor: gs.Tensor) -> bool:
    """Whether a convolution reads it, behind arithmetic at most; masks and pasts have four dimensions as well."""
    pending, seen = [tensor], 0
    while pending and seen < _NODES:
        value = pending.pop()
        for node in consumers(value):
            seen += 1
            if node.op == "Conv" and node.inputs[0] is value:
                return True
            if node.op in _ARITHMETIC:
                pending += node.outputs
    return False


def _drawn(picture: Array, random: np.random.Generator) -> Array:
    """``picture`` [colours, height, width] in float32, mirrored or not, a part of it, turned, as large."""
    from scipy import ndimage  # takes a while to import, and exact passes do without

    picture = np.asarray(picture, np.float32)
    picture = picture[:, :, ::-1] if random.random() < 0.5 else picture
    if random.random() >= _DRAWN:
        return picture
    scale, turn = np.exp(random.uniform(*np.log(_SCALES))), random.normal(0, _TURN)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = (np.array(picture.shape[1:]) - 1) / 2
    target = middle + random.uniform(-1, 1, 2) * max(0.0, 1 - scale) * middle
    return np.stack([ndimage.affine_transform(each, matrix, target - matrix @ middle, order=1, mode="reflect")
                     for each in picture])
