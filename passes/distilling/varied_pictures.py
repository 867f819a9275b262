"""Pictures that the feeds do not hold, made of theirs: what is right there the original model says.

A varied picture is mirrored or not; of most a part of the same proportions is drawn out to the whole, bilinearly; some are mixed
with another.

Source: random crops and mirrors, arXiv 1409.4842; mixing, arXiv 1710.09412.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ...graph.model import Model
from ...runtime import Feeds
from ...runtime.specs import input_specs

Array = npt.NDArray[Any]
_COLOURS = (1, 3, 4)
_SMALLEST = 16  # pixels of a side
_CUT = 0.7  # of the pictures
_LEAST = 0.5  # of a side, that is cut out
_MIXED = 0.2  # of the pictures


class VariedPictures:
    """Makes them.

    Args:
        model: says which inputs are pictures: float32 or float16 [rows, colours, height, width], or colours last.
        feeds: whose pictures.

    Attributes:
        any: whether there are pictures.
    """

    def __init__(self, model: Model, feeds: Feeds) -> None:
        self._feeds = feeds
        self._places: dict[str, tuple[int, int]] = {}
        for spec in input_specs(model):
            array = feeds[0].get(spec.name)
            if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.ndim == 4:
                sides = next((sides for colours, sides in ((1, (1, 2)), (3, (0, 1))) if array.shape[colours] in _COLOURS
                              and min(array.shape[1 + side] for side in sides) >= _SMALLEST), None)
                if sides is not None:
                    self._places[spec.name] = sides
        self.any = bool(self._places)

    def of(self, feed: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """A feed like ``feed`` with other pictures in it."""
        found = dict(feed)
        for name, sides in self._places.items():
            found[name] = np.stack([self._varied(name, picture, sides, random) for picture in feed[name]])
        return found

    def _varied(self, name: str, picture: Array, sides: tuple[int, int], random: np.random.Generator) -> Array:
        made = _cut(picture, sides, random)
        if random.random() < _MIXED:
            others = self._feeds[int(random.integers(len(self._feeds)))][name]
            other = others[random.integers(len(others))]
            if other.shape == picture.shape:
                part = 0.5 * random.random()
                made = (1 - part) * made + part * _cut(other, sides, random)
        return np.ascontiguousarray(made, picture.dtype)


def _cut(picture: Array, sides: tuple[int, int], random: np.random.Generator) -> Array:
    """``picture``, mirrored or not, or a part of it as large."""
    picture = np.flip(picture, sides[1]) if random.random() < 0.5 else picture
    if random.random() >= _CUT:
        return picture
    share = random.uniform(_LEAST, 1)
    scale, offset = np.ones(3), np.zeros(3)
    for side in sides:
        scale[side] = share
        offset[side] = random.uniform(0, (1 - share) * (picture.shape[side] - 1))
    return np.asarray(ndimage.affine_transform(picture.astype(np.float32), scale, offset, order=1, mode="nearest"))
