"""Two models compared with one of them in memory at a time."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.runtime import Feeds, compare, turns


@pytest.fixture
def pair(workshop, random):
    weight = random.standard_normal((16, 40), np.float32)
    return workshop.linear(weight, "a.onnx"), workshop.linear(weight + np.float32(0.01), "b.onnx")


@pytest.mark.parametrize("most", [1, 1 << 12, 1 << 28])
def test_the_drift_is_the_same_however_many_feeds_are_held(pair, random, monkeypatch, most):
    monkeypatch.setattr(turns, "_MOST_HELD", most)
    feeds = Feeds.of([{"x": random.standard_normal((2, 3, 16), np.float32)} for _ in range(5)])
    told = []
    lean = compare(*pair, feeds, lean=True, progress=lambda done, total: told.append((done, total)))
    ever = compare(*pair, feeds)
    assert lean.samples == ever.samples == 5
    assert lean.outputs["y"]["rel_l2"] == pytest.approx(ever.outputs["y"]["rel_l2"], rel=1e-4)
    assert told == [(number, 5) for number in range(1, 6)]


def test_never_more_than_one_is_open(pair, random, monkeypatch):
    opened = []

    class Spy:
        def __init__(self, name):
            assert opened == [], f"{opened} still open"
            opened.append(name)

        def run(self, feed, names):
            return {"y": np.zeros(3)}

        def __del__(self):
            opened.remove(self.name) if hasattr(self, "name") else opened.pop()

    feeds = Feeds.of([{"x": np.zeros(1)}] * 3)
    monkeypatch.setattr(turns, "_MOST_HELD", 1)
    assert len(list(turns.one_at_a_time(lambda: Spy("a"), lambda: Spy("b"), feeds, ["y"]))) == 3
    assert opened == []
