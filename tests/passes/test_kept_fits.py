"""Fits that a search keeps: what a plan gives with them is what it gives without, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.evidence import Streams
from ffnfold.passes.fitting.kept_fits import Fits
from ffnfold.passes.plan import Plan
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds
from masked_encoders import encoder, feed_of

EXACT = ["clean-up", "canonicalize-ffn", "fold-bias", "merge-linears"]
SLIM = "slim-ffn:multiple=1,refine=0"


@pytest.fixture
def feeds():
    found = []
    for number in range(10):
        feed = feed_of([[1, 1, 1, 1], [1, 0, 0, 0]])
        feed["input_ids"] = np.random.default_rng(number).integers(0, 40, (2, 4))
        found.append(feed)
    return Feeds.of(found)


@pytest.fixture
def make(tmp_path, feeds):
    encoder().save(tmp_path / "model.onnx")

    def make(widths: str, blocks: str, fits: Fits | None) -> bytes:
        model = Model.load(tmp_path / "model.onnx")
        run_plan(model, Plan.parse([*EXACT, f"{SLIM},blocks={blocks},widths={widths}"]), fit=feeds, threads=1, fits=fits)
        model.save(tmp_path / "out.onnx")
        return (tmp_path / "out.onnx").read_bytes()

    return make


@pytest.mark.parametrize(("first", "both"), [("0@0", "0@0-1"), ("4@0", "4@0/16@1"), ("8bare@0", "8bare@0/0@1")])
def test_a_block_fitted_behind_one_whose_fit_is_read(tmp_path, make, first, both):
    fits = Fits(tmp_path / "fits")
    make(first, "0", fits)
    assert make(both, "0-1", fits) == make(both, "0-1", None)


def test_nothing_is_run_where_all_fits_are_there(tmp_path, make, monkeypatch):
    fits = Fits(tmp_path / "fits")
    first = make("0@0-1", "0-1", fits)

    def fail(*args, **options):
        raise AssertionError("it goes through the feeds")

    monkeypatch.setattr(Streams, "_rows", fail)
    assert make("0@0-1", "0-1", fits) == first
