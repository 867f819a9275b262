"""What is measured of each form by itself where there is little time, and in which order."""

from __future__ import annotations

import json
import time
from functools import partial

import ffnfold.passes.optimize as optimize
import ffnfold.search.alone as alone
import ffnfold.search.latency as latency
import ffnfold.search.savings as savings
import pytest
from ffn_graphs import Sketch
from ffnfold.passes.fitting.evidence import OutOfTimeError
from ffnfold.runtime import parse_limit
from ffnfold.search import SearchJob, search_file
from ffnfold.search.alone import Alone, promising
from ffnfold.search.candidates import HEAD, KEEP, OTHERS, Candidate
from ffnfold.search.goal import Row
from ffnfold.search.levels import Problem, levels_of
from ffnfold.search.prediction import Damage, Time
from ffnfold.search.run import Search
from ffnfold.search.scoring import Bench, Setting
from ffnfold.search.shares import bytes_of, damages_of

INT8 = Candidate(form="int8")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(latency, "_MOST_ROUNDS", 15)
    monkeypatch.setattr(optimize, "race", partial(optimize.race, seconds=0.1))


@pytest.fixture
def job(model, feeds, tmp_path):
    """A search with a limit that everything keeps."""
    return partial(SearchJob, model, tmp_path / "out.onnx", feeds, limits=[parse_limit("cosine_mean=0.1")], threads=1,
                   cache=tmp_path / "cache", beside=False)


def test_the_last_block_has_its_part_of_the_time(monkeypatch):
    """What one block leaves of its part is the others'."""
    clock, measured = [0.0], []

    class Slow:
        def score(self, unit, each, until):
            assert until == 40.0
            clock[0] += 0.5 if unit == 1 else 3.0
            return {}

    monkeypatch.setattr(alone.time, "monotonic", lambda: clock[0])
    wanted = {unit: [Candidate(64 * width) for width in range(1, 8)] for unit in range(4)}
    Alone(None, Slow(), None, wanted, print).score_here(wanted, 40.0, lambda unit, each, scored: measured.append(unit))
    assert [measured.count(unit) for unit in range(4)] == [4, 7, 5, 4]


def test_units_that_save_most_are_measured_first():
    gone = Candidate(removed=True)
    saved = {(0, INT8): 0.1, (0, gone): 0.9, (1, INT8): 0.1, (HEAD, INT8): 0.4}
    wanted = {0: [INT8, gone], 1: [INT8], OTHERS: [], HEAD: [INT8]}
    assert list(promising(wanted, saved)) == [HEAD, 0, 1, OTHERS]
    assert promising(wanted, saved)[0] == wanted[0]


def test_moments_that_are_late_are_given_up(model, feeds):
    bench = Bench(Setting(model, feeds, "cpu", 1, short=True))
    with pytest.raises(OutOfTimeError):
        bench.score(1, Candidate(0), time.monotonic() - 1)
    bench.score(0, Candidate(0))
    with pytest.raises(OutOfTimeError):
        bench.score(1, Candidate(0), time.monotonic() - 1)
    late = bench.score(1, Candidate(0))
    assert "drift" in bench.score(1, Candidate(64))
    again = Bench(Setting(model, feeds, "cpu", 1)).score(1, Candidate(0))  # with moments of neurons
    assert late["drift"]["y"]["rel_l2"] == pytest.approx(again["drift"]["y"]["rel_l2"], rel=1e-6)


def test_what_was_measured_before_it_was_late_is_kept():
    class Late:
        def score(self, unit, each, until):
            if unit == 1:
                raise OutOfTimeError
            return {}

    measured = []
    wanted = {unit: [Candidate(64)] for unit in range(3)}
    Alone(None, Late(), None, wanted, print).score_here(wanted, time.monotonic() + 60,
                                                        lambda unit, each, scored: measured.append(unit))
    assert measured == [0]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_form_of_the_blocks_and_one_of_the_rest_are_measured_in_any_case(job, workers):
    """The model has no linears outside its blocks: of those it is known that they cannot be rounded."""
    said = []
    search = Search(job(minutes=5, workers=workers), said.append)
    for unit in (OTHERS, *range(3)):
        search.candidates[unit] = [KEEP, INT8, Candidate(form="8-bit"), Candidate(0)]
    saved = {(unit, each): value for unit in (OTHERS, *range(3)) for each, value in ((INT8, 0.1), (Candidate(form="8-bit"), 0.2))}
    search.measuring.measure(saved, time.monotonic() - 1)
    assert [message for message in said if message.startswith("drift")] == ["drift of all blocks together: 8-bit",
                                                                            "drift of attention: int8"]
    assert len(search.measuring.known()) == 3


def test_workers_that_come_too_late_leave_one_form_to_be_measured_here(job):
    """It takes longer than this to start a process."""
    search = Search(job(minutes=20, workers=2), lambda message: None)
    for unit, several in search.candidates.items():
        search.candidates[unit] = [KEEP] if unit == OTHERS else [KEEP, *several[1:3]]
    search.measuring.measure({}, time.monotonic() + 0.01)
    assert len(search.measuring.known()) == 1


def test_affine_maps_come_first_in_a_short_search(job):
    """From moments of the inputs alone, for all blocks before the neurons of any."""
    said = []
    search = Search(job(minutes=5), said.append)
    search.saved = {}
    search._alone()
    order = [message for message in said if message.startswith("moments")]
    assert order == [f"moments of {what}block {unit}" for what in ("the input of ", "") for unit in range(3)]


@pytest.mark.timeout(300)
def test_moments_that_are_late_are_given_up_and_the_search_goes_on(job, tmp_path, monkeypatch, quick):
    """The whole budget goes by while block 1 is gone through for its neurons."""
    said, passed, real = [], [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed[0])

    def progress(message):
        said.append(message)
        if message == "moments of block 1":
            passed[0] += 60 * 60.0

    report = search_file(job(minutes=5), progress)
    moments = said[:said.index("moments of block 1") + 1]
    assert [message for message in said if message.startswith("moments")] == [
        message for message in moments if message.startswith("moments")]
    keys = [json.loads(file.read_text())["key"] for file in (tmp_path / "cache").rglob("*.json")]
    slim = [[key for key in keys if key.startswith(f"('alone', {unit}, ") and ("slim" in key or "bare" in key)]
            for unit in range(3)]
    assert slim[0]
    assert not slim[1]
    assert not slim[2]
    assert sum(key.startswith("('alone'") and "'affine'" in key for key in keys) == 3  # they came before
    assert len(report["points"]) > 1


@pytest.mark.parametrize(("gone", "timed"), [(0.05, 3), (0.35, 1)])
def test_after_a_part_of_the_budget_only_one_form_of_each_unit_is_timed_in_the_whole_model(job, monkeypatch, gone, timed):
    """Of the budget a part is gone by when it begins."""
    asked = []

    def saved(workshop, changes, traffic):
        asked.extend((unit, str(each)) for unit, each in changes.items())
        return {"saved": 0.1}

    monkeypatch.setattr(savings, "saved_in_whole", saved)
    monkeypatch.setattr(savings, "milliseconds_of_base", lambda *which: [1.0, 1.0])
    search = Search(job(minutes=1000), lambda message: None)
    search._began -= gone * 60 * 1000
    forms = [INT8, Candidate(form="8-bit"), Candidate(form="4-bit")]
    search.candidates = {unit: [KEEP, *forms] for unit in (OTHERS, HEAD)}
    search._latency()
    assert asked == [(unit, str(each)) for unit in (OTHERS, HEAD) for each in forms[:timed]]
    assert search.candidates == {unit: [KEEP, *forms[:timed]] for unit in (OTHERS, HEAD)}


@pytest.mark.parametrize(("whole", "scale"), [(0.3, 1.5), (0.9, 2.5), (0.02, 0.5), (None, 1.0)])
def test_what_cut_blocks_save_is_scaled_to_the_whole_model(job, monkeypatch, whole, scale):
    """Two blocks, each 0.1 of the time faster in its fastest form that needs no fit."""
    asked = []

    def saved(workshop, changes, traffic):
        asked.append(changes)
        return {"saved": whole}

    forms = [KEEP, INT8, Candidate(form="8-bit"), Candidate(64)]
    times = dict(zip(map(str, forms), (0.5, 0.4, 0.45, 0.3), strict=True))
    monkeypatch.setattr(savings, "saved_in_whole", saved)
    monkeypatch.setattr(savings, "milliseconds_of_base", lambda *which: [1.0, 1.0])
    monkeypatch.setattr(savings, "block_times", lambda *which: times)
    search = Search(job(minutes=20), lambda message: None)
    search.savings.measure({0: forms, 1: forms}, time.monotonic() + 60)
    assert asked == [{0: INT8, 1: INT8}]
    for unit in (0, 1):
        assert [search.savings.saved[unit, each] for each in forms] == pytest.approx([0, 0.1 * scale, 0.05 * scale, 0.2 * scale])


@pytest.mark.parametrize("minutes", [5, 20])
def test_in_a_short_search_integers_are_measured_in_all_blocks_together(job, minutes):
    search = Search(job(minutes=minutes), lambda message: None)
    forms = [each for each in search.candidates[0] if each.form and not each.fitted]
    for unit in (OTHERS, *range(3)):
        search.candidates[unit] = [KEEP, *forms]
    assert [unit for unit, several in search.measuring.unknown().items() if several] == ([OTHERS] if minutes < 10 else
                                                                                        [0, 1, 2, OTHERS])
    search.measuring.measure({}, time.monotonic() + 60)
    known = search.measuring.known()
    units = [known[unit, each].get("units") for unit in range(3) for each in forms]
    assert all(each == ([0, 1, 2] if minutes < 10 else None) for each in units)
    assert not any(unit == OTHERS for unit, _ in known)  # this model has no linears outside its blocks
    assert not any(search.measuring.unknown().values())
    together = search.bench.yardstick.measure(search.bench.workshop.rewritten(dict.fromkeys(range(3), forms[0]), {}))
    whole = 1 - together["y"]["cosine_mean"]
    shares = sum(damages_of(known, Row("cosine_mean", "y"))[unit, forms[0]] for unit in range(3))
    assert shares == pytest.approx(whole, rel=1e-6 if minutes < 10 else 0.9)


@pytest.mark.parametrize("gone", [True, False])
def test_blocks_have_their_own_parts_of_what_was_measured_together(job, tmp_path, gone):
    """Of bytes by their weights; of damage by what they do to the outputs, which a wide block does no more than others."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", 64])
    for number, d_ff in enumerate((1024, 64, 128)):
        x = s.op("Add", x, s.ffn(s.norm(x, 64), 64, d_ff, activation="gelu", name=f"/layer.{number}/ffn"))
    s.op("Identity", x, out=s.output("y", ["batch", "tokens", 64]))
    s.save(tmp_path / "model.onnx")
    search, row = Search(job(minutes=5), lambda message: None), Row("cosine_mean", "y")
    for unit in range(3):
        search.candidates[unit] = [KEEP, INT8, *([Candidate(removed=True)] if gone else [])]
    search.measuring.measure({}, time.monotonic() + 60)
    known = search.measuring.known()
    alone = {(unit, INT8): search.bench.score(unit, INT8) for unit in range(3)}
    sizes, really = bytes_of(known, search.bench.workshop.blocks), bytes_of(alone, {})
    damages, done = damages_of(known, row), damages_of(alone, row)
    for unit in range(3):
        assert sizes[unit, INT8] == pytest.approx(really[unit, INT8], rel=0.2)
        assert damages[unit, INT8] == pytest.approx(done[unit, INT8], rel=0.3 if gone else 0.6)
    assert sum(sizes[unit, INT8] for unit in range(3)) == pytest.approx(known[0, INT8]["bytes"])
    assert sum(damages[unit, INT8] for unit in range(3)) == pytest.approx(row.damage(known[0, INT8]["drift"]))
    search.records.put(alone[0, INT8], "alone", 0, str(INT8))  # as a longer search leaves it
    assert bytes_of(search.measuring.known(), search.bench.workshop.blocks) == sizes


@pytest.mark.timeout(300)
def test_where_measuring_took_all_the_time_what_needs_no_fit_is_built_all_the_same(job, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(Search, "over", True)
    report = search_file(job(minutes=2))
    known = {json.loads(file.read_text())["key"] for file in (tmp_path / "cache").rglob("*.json")}
    assert any("removed" in key for key in known if key.startswith("('alone'"))
    assert len(report["points"]) in (2, 3)  # as it was, and what is best without a fit, with all blocks there and without
    assert any("remove-ffn" in str(point["plan"]) for point in report["points"])
    assert not any("slim-ffn" in str(point["plan"]) for point in report["points"])
    assert report["speedup"] > 1


def test_where_the_goal_cannot_be_reached_late_the_first_level_is_built_that_can(job, monkeypatch):
    """With blocks and without."""
    gone = Candidate(removed=True)
    search = Search(job(minutes=5, limits=(), min_speedup=2.0), lambda message: None)
    search.candidates = {unit: [KEEP, INT8, Candidate(0), gone] for unit in range(3)}
    damage = {KEEP: 0.0, INT8: 0.01, Candidate(0): 0.02, gone: 0.1}
    saved = {KEEP: 0.0, INT8: 0.14, Candidate(0): 0.3, gone: 0.2}
    alone, clock = ({(unit, each): each_of[each] for unit in range(3) for each in each_of} for each_of in (damage, saved))
    search.problem = Problem(search.candidates, search.rows, [Damage(alone)], Time(1.0, clock), dict.fromkeys(alone, 0.0), 0)
    built = []
    monkeypatch.setattr(search, "_visit", built.append)
    search._visit_late(levels_of(search.job))
    assert built[0] == dict.fromkeys(range(3), INT8)  # 1 / 0.58: of the levels it reaches 2 · 0.8 = 1.6 only
    assert sorted(map(str, built[1].values())) == ["int8", "removed", "removed"]  # 1 / 0.46
    assert len(built) == 2


@pytest.mark.timeout(300)
def test_with_no_time_at_all_there_is_a_plan(job, tmp_path, quick):
    report = search_file(job(minutes=0.001))
    assert report["ok"]
    assert len(report["points"]) > 1
    known = [json.loads(file.read_text())["key"] for file in (tmp_path / "cache").rglob("*.json")]
    assert sum(key.startswith(("('alone'", "('together'")) for key in known) <= 2
