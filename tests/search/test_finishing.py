"""Exact passes that end every plan where they pay on the feeds at hand."""

from __future__ import annotations

import math
from functools import partial

import ffnfold.passes.optimize as optimize
import ffnfold.search.finishing as finishing
import ffnfold.search.latency as latency
import numpy as np
import pytest
from click.testing import CliRunner
from ffnfold.cli import main
from ffnfold.passes.skip_padding import SkipPadding
from ffnfold.runtime import Feeds, parse_limit
from ffnfold.search import SearchJob, search_file
from ffnfold.search.latency import Traffic, block_times
from ffnfold.search.workshop import Workshop
from masked_encoders import encoder, feed_of

PADDED, FULL = [[1, 1, 1, 1], [1, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.fixture
def model(tmp_path):
    return encoder().save(tmp_path / "model.onnx")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(latency, "_SECONDS_WHOLE", 0.05)
    monkeypatch.setattr(latency, "_SECONDS", 0.02)
    monkeypatch.setattr(optimize, "race", partial(optimize.race, seconds=0.1))


def workshop(model, feeds: Feeds) -> Workshop:
    return Workshop(model, feeds, "cpu", 1)


@pytest.mark.parametrize(("mask", "worth", "kept"), [
    (PADDED, math.inf, True), (PADDED, 0.0, False), (FULL, math.inf, False)], ids=["faster", "no faster", "no padding"])
def test_what_is_no_faster_is_not_kept(quick, monkeypatch, model, mask, worth, kept):
    monkeypatch.setattr(finishing, "_WORTH", worth)
    feeds = Feeds.of([feed_of(mask)])
    assert finishing.finishing_passes(workshop(model, feeds), [Traffic("feeds", feeds)]) == {"skip-padding": kept}


def test_blocks_are_timed_on_the_rows_that_count(quick, monkeypatch, model):
    seen = []

    def race(made, workshop, feeds):
        seen.extend(value.shape for feed in feeds for value in feed.values() if value.ndim == 3)
        return dict.fromkeys(made, 1.0)

    monkeypatch.setattr(latency, "_race_cuts", lambda shop, made, feeds: race(made, shop, feeds))
    feeds = Feeds.of([feed_of(PADDED)])
    shop = workshop(model, feeds)
    for last, rows in (((), (2, 4, 8)), ((SkipPadding(),), (1, 5, 8))):
        seen.clear()
        shop.last = last
        block_times(shop, 0, [], [Traffic("feeds", feeds)])
        assert seen
        assert set(seen) == {rows}


def test_every_plan_of_a_search_ends_with_it(quick, monkeypatch, model, tmp_path):
    monkeypatch.setattr(finishing, "_WORTH", math.inf)
    folder = tmp_path / "feeds"
    folder.mkdir()
    (tmp_path / "out").mkdir()
    for number in range(10):
        feed = feed_of(PADDED)
        feed["input_ids"] = np.random.default_rng(number).integers(0, 40, (2, 4))
        np.savez(folder / f"{number:02}.npz", **feed)
    job = SearchJob(model, tmp_path / "out/out.onnx", folder, limits=[parse_limit("cosine_mean=0.5")], threads=1,
                    cache=tmp_path / "cache", minutes=0.3)
    report = search_file(job)
    assert len(report["points"]) > 1
    assert {point["plan"][-1] for point in report["points"]} == {"skip-padding"}
    assert report["drift"]["outputs"]["mean"]["cosine_mean"] >= 0.5

    made = CliRunner().invoke(main, ["optimize", str(model), "-o", str(tmp_path / "again.onnx"), "--plan",
                                     str(tmp_path / "out/plan.yaml"), "--data", str(folder), "--threads", "1", "--no-verify"])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out/out.onnx").read_bytes()
