"""Varied pictures: what may change, and what may not."""

from __future__ import annotations

import ffnfold.passes.fitting.varied_pictures as varied_pictures
import numpy as np
import pytest
from ffn_graphs import Sketch
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.varied_feeds import varied
from ffnfold.passes.fitting.varied_pictures import VariedPictures
from ffnfold.runtime import Feeds
from onnx import TensorProto

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def pictures(tmp_path, feeds, *, convolved: bool = True) -> VariedPictures:
    """Of a model that takes the feeds, a convolution of one pixel behind each."""
    s = Sketch()
    for name, value in feeds[0].items():
        x = s.input(name, list(value.shape), TYPES[str(value.dtype)])
        x = x if value.dtype == np.float32 else s.op("Cast", x, to=TensorProto.FLOAT)
        if value.ndim == 4 and value.shape[1] not in (1, 3):
            x = s.op("Transpose", x, perm=[0, 3, 1, 2])
        colours = value.shape[3] if value.ndim == 4 and value.shape[1] not in (1, 3) else value.shape[1]
        kernel = s.weight(s.numbers(2, colours, *[1] * (value.ndim - 2)))
        s.op(*(("Conv", x, kernel) if convolved else ("Neg", x)), out=s.output(f"of {name}"))
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
    assert all(np.isfinite(each).all() for each in found)


def test_a_part_is_drawn_out_to_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(varied_pictures, "_COLOURED", 0)
    monkeypatch.setattr(varied_pictures, "_MIXED", 0)
    monkeypatch.setattr(varied_pictures, "_TURN", 0)
    feeds = slopes((1, 3, 32, 32))
    made = pictures(tmp_path, feeds)
    random = np.random.default_rng(1)
    found = [made.of(feeds[0], random)["image"] for _ in range(60)]
    whole = feeds[0]["image"][0, 0]
    shares = [np.ptp(each[0, 0, :, 0]) / np.ptp(whole[:, 0]) for each in found]
    assert 0.3 < min(shares) < 0.6
    assert max(shares) >= 0.999
    assert {bool(each[0, 0, 16, 31] > each[0, 0, 16, 0]) for each in found} == {True, False}
    least, most = feeds[0]["image"].min(), feeds[0]["image"].max()
    assert all(least - 1e-4 <= each.min() and each.max() <= most + 1e-4 for each in found)


def test_colours_last_are_those_of_colours_first(tmp_path):
    first = slopes((1, 3, 20, 24))
    last = [{"image": np.moveaxis(feed["image"], 1, -1)} for feed in first]
    one, other = pictures(tmp_path, first), pictures(tmp_path, last)
    for seed in range(10):
        found = [made.of(feeds[2], np.random.default_rng(seed))["image"] for made, feeds in ((one, first), (other, last))]
        np.testing.assert_allclose(np.moveaxis(found[1], -1, 1), found[0], rtol=1e-6)


@pytest.mark.parametrize("feed", [{"x": np.ones((1, 5, 8), np.float32)}, {"x": np.ones((1, 12, 20, 64), np.float32)},
                                  {"x": np.ones((1, 3, 8, 8), np.float32)}, {"x": np.ones((1, 3, 32, 32), np.int64)}],
                         ids=["tokens", "heads", "small", "integers"])
def test_what_is_no_picture(tmp_path, feed):
    assert not pictures(tmp_path, [feed]).any


def test_masks_and_pasts_are_no_pictures(tmp_path):
    assert not pictures(tmp_path, slopes((1, 1, 32, 32)), convolved=False).any


def test_feeds_without_a_picture_stay(tmp_path):
    feeds = [{}, *slopes((1, 3, 20, 24), count=3), {"image": None}, {"image": np.zeros((0, 3, 20, 24), np.float32)}]
    pictures(tmp_path, feeds[1:2])
    made = VariedPictures(Model.load(tmp_path / "m.onnx"), Feeds.of(feeds))
    random = np.random.default_rng(0)
    assert made.any
    for _ in range(20):
        for number in (0, 4, 5):
            found = made.of(feeds[number], random)
            assert found.keys() == feeds[number].keys()
            assert found.get("image") is None or not found["image"].size
        assert made.of(feeds[1], random)["image"].shape == (1, 3, 20, 24)


def test_copies_for_a_fit_mix_no_feeds(tmp_path):
    feeds = [{"image": np.full((1, 3, 20, 24), number, np.float32)} for number in range(4)]
    pictures(tmp_path, feeds)
    found = varied(Model.load(tmp_path / "m.onnx"), Feeds.of(feeds), 8)
    assert all(feed["image"].std(axis=(0, 2, 3)).max() < 1e-6 for feed in found)
    assert all(np.abs(feed["image"]).max() == 0 for number, feed in enumerate(found) if number % 4 == 0)


def test_copies_for_a_fit(tmp_path):
    feeds = slopes((1, 3, 20, 24), count=4)
    pictures(tmp_path, feeds)
    found = varied(Model.load(tmp_path / "m.onnx"), Feeds.of(feeds), 2)
    assert len(found) == 12
    assert all(np.array_equal(found[number]["image"], feed["image"]) for number, feed in enumerate(feeds))
    assert len({feed["image"].tobytes() for feed in found}) > 10
    assert all(np.array_equal(one["image"], other["image"]) for one, other in zip(found, found, strict=True))
