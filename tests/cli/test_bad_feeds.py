"""Feeds that the model fails on: the error names the one, and says what to look at."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch
from onnx import TensorProto


@pytest.mark.parametrize(("ids", "said", "first"), [
    (np.full((1, 4), 99), "within the inclusive range", "4.npz"),
    (np.zeros((0, 4), np.int64), "reshaped", "0.npz"),  # nothing fails where it is fitted to
])
def test_a_feed_that_the_model_fails_on_is_named(refused, folder, ids, said, first):
    model, feeds = embedding(folder), folder / "feeds"
    feeds.mkdir()
    for number in range(6):
        np.savez(feeds / f"{number}.npz", ids=ids if number in (0, 4) else np.ones((1, 4), np.int64))
    for bad, command in ((first, ["optimize", model, "-o", "out.onnx", "-p", "remove-ffn:keep=mean"]),
                         (first, ["optimize", model, "-o", "out.onnx", "-p", "linearize-ffn"]),
                         ("0.npz", ["verify", model, model]), ("0.npz", ["bench", model])):
        line = refused(*command, "--data", feeds)
        assert line.startswith(f"ffnfold: {feeds / bad}: ONNX Runtime cannot run {model} on it: ")
        assert said in line
        assert "token ids are in the vocabulary and no dimension is 0" in line


def embedding(folder):
    """Token ids of ten words → an FFN block; a Reshape takes no empty batch."""
    s = Sketch()
    ids = s.input("ids", ["batch", 4], TensorProto.INT64)
    x = s.op("Gather", s.weight(s.numbers(10, 8)), ids)
    s.op("Reshape", s.op("Add", x, s.ffn(x)), s.weight(np.array([0, -1])), out=s.output("y", ["batch", 32]))
    return s.save(folder / "embedding.onnx")


def test_inputs_are_real_or_made_up(refused, model, feeds):
    for command in (["optimize", model, "-o", "out.onnx"], ["verify", model, model]):
        assert "--data and --synthetic exclude each other" in refused(*command, "--data", feeds, "--synthetic")
