"""Joined texts: what changes in a feed, and what stays."""

from __future__ import annotations

import numpy as np
from ffn_graphs import Sketch
from ffnfold.graph.model import Model
from ffnfold.passes.distilling.joined_texts import JoinedTexts
from ffnfold.runtime import Feeds
from onnx import TensorProto

WORDS = 1000


def texts(tmp_path, feeds) -> JoinedTexts:
    s = Sketch()
    s.input("attention_mask", ["batch", "tokens"], TensorProto.INT64)
    ids = s.input("ids", ["batch", "tokens"], TensorProto.INT64)
    s.op("Gather", s.weight(s.numbers(WORDS, 4)), ids, out=s.output("y"))
    return JoinedTexts(Model.load(s.save(tmp_path / "m.onnx")), Feeds.of(feeds))


def feeds() -> list[dict[str, np.ndarray]]:
    """Rows 1 … 2, then padding; the words of row r are 100 r, 100 r + 1, …"""
    found = []
    for number in range(9):
        ids = np.zeros((1, 60), np.int64)
        ids[0, 1:41] = 100 * number + 10 + np.arange(40)
        ids[0, 0], ids[0, 41] = 1, 2
        found.append({"ids": ids, "attention_mask": (ids > 0).astype(np.int64)})
    return found


def test_pieces_of_other_rows_in_the_same_frame(tmp_path):
    given = feeds()
    made = texts(tmp_path, given)
    random = np.random.default_rng(0)
    found = np.concatenate([made.of(given[4], random)["ids"] for _ in range(40)])
    assert (found[:, 0] == 1).all()
    assert (found[:, 41] == 2).all()
    assert (found[:, 42:] == 0).all()
    assert (given[4]["ids"][0, 1:41] == 410 + np.arange(40)).all(), "what was given is left as it was"
    follows = (np.diff(found[:, 1:41]) == 1).mean()
    assert 0.6 < follows < 0.95
    own = (found[:, 1:41] // 100 == 4).mean(axis=1) > 0.5
    assert 5 < own.sum() < 25
    unknown = ~np.isin(found[:, 1:41], np.concatenate([feed["ids"] for feed in given]))
    assert 0 < unknown.mean() < 0.15


def test_the_same_generator_gives_the_same_texts(tmp_path):
    given = feeds()
    made = texts(tmp_path, given)
    one, two = (made.of(given[0], np.random.default_rng(5))["ids"] for _ in range(2))
    assert (one == two).all()


def test_feeds_without_texts_stay(tmp_path):
    s = Sketch()
    s.op("Identity", s.input("x", [2]), out=s.output("y"))
    given = [{"x": np.ones(2, np.float32)}]
    made = JoinedTexts(Model.load(s.save(tmp_path / "m.onnx")), Feeds.of(given))
    assert not made.any
    assert made.of(given[0], np.random.default_rng(0)) == given[0]
