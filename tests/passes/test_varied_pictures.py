"""Varied pictures: what may change, and what may not."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch
from ffnfold.graph.model import Model
from ffnfold.passes.distilling.varied_pictures import VariedPictures
from ffnfold.runtime import Feeds
from onnx import TensorProto

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def pictures(tmp_path, feeds) -> VariedPictures:
    s = Sketch()
    for name, value in feeds[0].items():
        kind = TYPES[str(value.dtype)]
        s.op("Neg", s.input(name, list(value.shape), kind), out=s.output(f"minus {name}", onnx_type=kind))
    return VariedPictures(Model.load(s.save(tmp_path / "m.onnx")), Feeds.of(feeds))


def slopes(shape, dtype=np.float32, count=6) -> list[dict[str, np.ndarray]]:
    """Pictures that grow from left to right and from top to bottom, the number of the picture in the corner."""
    grid = np.indices(shape)
    return [{"image": (number + grid.sum(axis=0) / sum(shape)).astype(dtype)} for number in range(count)]


@pytest.mark.parametrize("shape", [(1, 3, 20, 24), (2, 20, 24, 3), (1, 1, 16, 16)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_other_pictures_of_the_same_kind(tmp_path, shape, dtype):
    feeds = slopes(shape, dtype)
    made = pictures(tmp_path, feeds)
    random = np.random.default_rng(0)
    found = [made.of(feeds[3], random)["image"] for _ in range(30)]
    assert {(each.shape, each.dtype) for each in found} == {(shape, np.dtype(dtype))}
    assert len({each.tobytes() for each in found}) > 20
    low, high = min(feed["image"].min() for feed in feeds), max(feed["image"].max() for feed in feeds)
    assert all(low - 1e-2 <= each.min() and each.max() <= high + 1e-2 for each in found)


def test_a_part_is_drawn_out_to_the_whole(tmp_path):
    feeds = slopes((1, 3, 32, 32))
    made = pictures(tmp_path, feeds)
    random = np.random.default_rng(1)
    ranges = [np.ptp(made.of(feeds[0], random)["image"][0, 0, :, 0]) for _ in range(60)]
    whole = np.ptp(feeds[0]["image"][0, 0, :, 0])
    assert min(ranges) < 0.75 * whole
    assert max(ranges) >= 0.999 * whole
    assert min(ranges) > 0.4 * whole


@pytest.mark.parametrize("feed", [{"x": np.ones((1, 5, 8), np.float32)}, {"x": np.ones((1, 12, 20, 64), np.float32)},
                                  {"x": np.ones((1, 3, 8, 8), np.float32)}, {"x": np.ones((1, 3, 32, 32), np.int64)}],
                         ids=["tokens", "heads", "small", "integers"])
def test_what_is_no_picture(tmp_path, feed):
    assert not pictures(tmp_path, [feed]).any
