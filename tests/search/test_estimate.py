"""What a dry run says is still to be measured, and how long that takes."""

from __future__ import annotations

from types import SimpleNamespace

import ffnfold.search.estimate as estimate_module
import pytest
from ffnfold.runtime import parse_limit
from ffnfold.search import SearchJob
from ffnfold.search.estimate import estimate
from ffnfold.search.run import Search

SECONDS = 600.0  # that one measurement takes


@pytest.fixture
def dry(model, feeds, tmp_path, monkeypatch):
    """A search, and what a dry run of it says now."""

    def begin(minutes: float):
        search = Search(SearchJob(model, tmp_path / "out.onnx", feeds, limits=[parse_limit("cosine_mean=0.9")], threads=1,
                                  cache=tmp_path / "cache", minutes=minutes), lambda message: None)

        def now() -> dict:
            monkeypatch.setattr(estimate_module, "time", SimpleNamespace(perf_counter=iter([0.0, SECONDS]).__next__))
            return estimate(search.job, search.bench, search.candidates, search.measuring, search.traffic)

        return search, now

    return begin


def test_forms_that_were_measured_together_are_not_counted_again(dry):
    search, now = dry(5)
    before, shared = now(), search.measuring.shared()
    assert len(shared) > 1
    for number, (each, units) in enumerate(shared.items(), 1):
        search.records.put({"drift": {}, "bytes": 0}, "together", units, str(each))
        found = now()
        assert before["measurements"]["drift"] - found["measurements"]["drift"] == number
        assert before["minutes"]["alone"] - found["minutes"]["alone"] == pytest.approx(number * 1.5 * SECONDS / 60)


@pytest.mark.parametrize(("minutes", "passes"), [(5, [2, 1, 0]), (20, [1, 1, 0])])
def test_a_short_search_goes_over_the_feeds_for_affine_maps_and_then_for_neurons(dry, minutes, passes):
    search, now = dry(minutes)
    fit = 4 * SECONDS / (2 * len(search.bench.split.choose)) * len(search.bench.split.fit)
    found = [now()]
    for maps in (False, True):
        for unit, several in search.measuring.unknown().items():
            for each in several:
                if each.fitted and each.parts is None and (each.neurons == 0) == maps:
                    search.records.put({"drift": {}, "bytes": 0}, "alone", unit, str(each))
        found.append(now())
    minutes_of = [each["minutes"]["alone"] - each["measurements"]["drift"] * 1.5 * SECONDS / 60 for each in found]
    assert [round(60 * (each - minutes_of[-1]) / fit, 3) for each in minutes_of] == passes
