"""The integer program, the laws of damage and time that it takes, and the limits that they stand for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from ffn_graphs import transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.runtime.limits import METRICS
from ffnfold.search.candidates import HEAD, KEEP, OTHERS, Candidate, block_candidates, plan_of, spread_out
from ffnfold.search.choice import Bound, choose
from ffnfold.search.front import Expected, Point, front_of
from ffnfold.search.goal import Row, damage, parse_goal, rows_of
from ffnfold.search.levels import turn
from ffnfold.search.prediction import Damage, Time

FORMS = [KEEP, Candidate(64), Candidate(0), Candidate(form="int8"), Candidate(64, form="int8"), Candidate(removed=True)]


def numbers(random: np.random.Generator, units: int) -> dict[tuple[int, Candidate], float]:
    return {(unit, each): 0.0 if each == KEEP else float(random.random()) for unit in range(units) for each in FORMS}


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_limits_is_better(seed):
    random = np.random.default_rng(seed)
    units = dict.fromkeys(range(4), FORMS)
    costs = {key: -value for key, value in numbers(random, 4).items()}
    bounds = [Bound(numbers(random, 4), float(limit)) for limit in random.uniform(0.3, 1.5, 2)]
    found = choose(units, costs, bounds)
    best = min(sum(costs[item] for item in enumerate(forms)) for forms in itertools.product(FORMS, repeat=4)
               if all(sum(bound.sizes[item] for item in enumerate(forms)) <= bound.limit for bound in bounds))
    assert found is not None
    assert sum(costs[item] for item in found.items()) == pytest.approx(best, abs=1e-6)
    assert all(sum(bound.sizes[item] for item in found.items()) <= bound.limit + 1e-6 for bound in bounds)


def test_small_limits_count_as_exactly_as_large_ones():
    units = {0: [KEEP, Candidate(0)], 1: [KEEP, Candidate(0)]}
    costs = {(unit, each): -float(each != KEEP) for unit in units for each in units[unit]}
    sizes = {(unit, each): (each != KEEP) * 1e-9 * (1 + unit) for unit in units for each in units[unit]}
    assert choose(units, costs, [Bound(sizes, 1.5e-9)]) == {0: Candidate(0), 1: KEEP}


def test_limits_that_nothing_keeps_give_nothing():
    sizes = {(0, KEEP): 1.0, (0, Candidate(0)): math.inf}
    assert choose({0: [KEEP, Candidate(0)]}, sizes, [Bound(sizes, 0.5)]) is None


def test_damage_is_a_sum_until_something_is_measured():
    law = Damage({(0, KEEP): 0.0, (0, Candidate(0)): 0.1, (1, Candidate(0)): 0.3})
    assert law.of({0: Candidate(0), 1: Candidate(0)}) == pytest.approx(0.4)
    assert law.of({0: KEEP}) == 0.0
    assert law.sum_at(law.of({0: Candidate(0)})) == pytest.approx(0.1)


def test_damage_learns_the_law_that_choices_follow():
    random = np.random.default_rng(1)
    law = Damage(numbers(random, 6))
    choices = [{unit: FORMS[number] for unit, number in enumerate(random.integers(0, len(FORMS), 6))} for _ in range(24)]
    truth = [1.7 * sum(law.alone[item] for item in choice.items()) ** 1.2 for choice in choices]
    before = [abs(law.of(choice) / true - 1) for choice, true in zip(choices[12:], truth[12:], strict=True)]
    law.learn(list(zip(choices[:12], truth[:12], strict=True)))
    after = [abs(law.of(choice) / true - 1) for choice, true in zip(choices[12:], truth[12:], strict=True)]
    assert max(after) < 0.1 < min(before)
    choice = choices[0]
    assert law.sum_at(law.of(choice)) == pytest.approx(sum(law.sizes()[item] for item in choice.items()))


def test_a_unit_that_does_more_harm_beside_others_gets_a_larger_share():
    law = Damage({(unit, each): 0.0 if each == KEEP else 0.1 for unit in range(3) for each in FORMS})
    measured = [({0: Candidate(0), 1: KEEP, 2: Candidate(0)}, 0.8), ({0: KEEP, 1: Candidate(0), 2: Candidate(0)}, 0.2),
                ({0: Candidate(0), 1: Candidate(0), 2: KEEP}, 0.8)]
    law.learn(measured)
    assert law.sizes()[0, Candidate(0)] > 1.5 * law.sizes()[1, Candidate(0)]
    for choice, found in measured:
        assert law.of(choice) == pytest.approx(found, rel=0.2)


def test_time_learns_what_is_really_saved():
    clock = Time(1.0, {(unit, each): 0.0 if each == KEEP else 0.1 for unit in range(3) for each in FORMS})
    two = {0: Candidate(0), 1: Candidate(0), 2: KEEP}
    assert clock.of(two) == pytest.approx(0.8)
    clock.learn([(two, 0.86), ({0: Candidate(0), 1: KEEP, 2: KEEP}, 0.93)])
    assert clock.of({0: Candidate(0), 1: Candidate(0), 2: Candidate(0)}) == pytest.approx(0.79, abs=0.01)


def test_time_learns_where_savings_begin():
    clock = Time(0.6, {(0, KEEP): 0.0, (0, FORMS[1]): 0.2})
    assert clock.of({0: FORMS[1]}) == pytest.approx(0.4)
    clock.learn([({0: KEEP}, 0.8)])
    assert clock.of({0: KEEP}) == pytest.approx(0.7)  # the mean of both races
    assert clock.of({0: FORMS[1]}) == pytest.approx(0.5, abs=1e-3)



@pytest.mark.parametrize("metric", [*METRICS, "perplexity", "score"])
def test_more_drift_is_more_damage(metric):
    better, worse = (0.99, 0.9) if metric.startswith(("cosine", "top")) else (40, 20) if metric == "sqnr_db" else (1.01, 1.2)
    assert 0 <= damage(metric, better) < damage(metric, worse)


def test_what_is_no_number_is_beyond_every_limit():
    assert Row("cosine_mean", "y", 0.1).damage({"y": {"cosine_mean": None}}) == math.inf
    assert Row("cosine_mean", "y", 0.1).damage({}) == math.inf


def test_a_limit_without_an_output_is_for_all():
    assert [(row.output, row.limit) for row in rows_of([parse_goal("cosine_mean=0.75")], ["a", "b"], set())] == [
        ("a", 0.25), ("b", 0.25)]
    assert [(row.output, row.metric) for row in rows_of([], ["a", "logits"], {"logits"})] == [
        ("a", "cosine_mean"), ("logits", "kl_mean")]
    [row] = rows_of([parse_goal("perplexity=1.05")], ["logits"], {"logits"})
    assert row.limit == pytest.approx(math.log(1.05))


@pytest.mark.parametrize(("text", "said"), [("kl_mean=0.1", "logits"), ("rel_l2@z=1", "no output 'z'")])
def test_a_limit_on_what_is_not_there_is_refused(text, said):
    with pytest.raises(InputError, match=said):
        rows_of([parse_goal(text)], ["y"], set())


def test_a_choice_becomes_a_plan_with_one_fit():
    choice = {0: Candidate(64), 1: KEEP, 2: Candidate(0), 3: Candidate(64, form="int8"), 4: Candidate(removed=True),
              5: Candidate(form="int8"), 6: Candidate(ratio=0.5), 7: Candidate(64, bare=True), OTHERS: Candidate(form="8-bit")}
    plan = plan_of(choice, "cpu")
    assert plan.entries()[-5:] == [
        {"remove-ffn": {"blocks": "4"}},
        {"slim-ffn": {"blocks": "0+2-3+7", "multiple": 1, "refine": 0, "widths": "0@2/64@0+3/64bare@7"}},
        {"factorize-ffn": {"blocks": "6"}},
        {"quantize-ffn": {"blocks": "3+5", "form": "dynamic", "smooth": "feeds"}},
        {"quantize-ffn": {"blocks": "none", "form": "nbits", "also": "attention"}}]
    assert type(plan).from_entries(plan.entries()) == plan


@pytest.mark.parametrize(("units", "also"), [([OTHERS], "attention"), ([HEAD], "head"), ([OTHERS, HEAD], "everything")])
def test_the_head_is_a_choice_of_its_own(units, also):
    plan = plan_of(dict.fromkeys(units, Candidate(form="8-bit")), "cpu")
    assert plan.entries()[-1] == {"quantize-ffn": {"blocks": "none", "form": "nbits", "also": also}}
    other = plan_of({1: Candidate(form="4-bit"), **dict.fromkeys(units, Candidate(form="8-bit"))}, "cpu")
    assert other.entries()[-2:] == [plan.entries()[-1], {"quantize-ffn": {"blocks": "1", "bits": 4}}]


def test_few_feeds_that_scatter_leave_more_room_than_many():
    rows = [Row("cosine_mean", "y", 0.1)]

    def point(*cosines: float) -> Point:
        parts = [{"y": {"cosine_mean": each}} for each in cosines]
        mean = {"y": {"cosine_mean": float(np.mean(cosines))}}
        return Point({}, plan_of({}, "cpu"), mean, 1.0, 0, Expected((0.0,), 1.0), parts)

    [alike] = point(0.95, 0.95, 0.95, 0.95).upper(rows)
    [many] = point(*[0.93, 0.97] * 4).upper(rows)
    [few] = point(0.93, 0.97).upper(rows)
    assert alike == pytest.approx(0.05)
    assert 0.05 < many < 0.07 < few
    [one] = point(0.95).upper(rows)
    assert one == pytest.approx(0.05)


def test_the_front_is_what_no_other_plan_beats():
    rows = [Row("cosine_mean", "y")]

    def point(cosine: float, time: float, size: int) -> Point:
        return Point({}, plan_of({}, "cpu"), {"y": {"cosine_mean": cosine}}, time, size, Expected((0.0,), 1.0))

    slow, beaten, fast, small = point(1.0, 1.0, 9), point(0.9, 0.8, 9), point(0.95, 0.7, 9), point(0.9, 0.9, 5)
    assert front_of([beaten, fast, slow, small], rows) == [slow, small, fast]


@pytest.mark.parametrize(("d_ff", "few", "gptq"), [(256, False, True), (256, True, False), (8192, False, False)])
def test_errors_of_rounding_are_undone_where_there_is_time(tmp_path, d_ff, few, gptq):
    s = transformer(1, 64, d_ff, activation="gelu")
    [block] = find_ffn_blocks(Model.load(s.save(tmp_path / "model.onnx")))
    forms = {each.form for each in block_candidates(block, "cpu", few=few)}
    assert ("int8-gptq" in forms, "int8" in forms) == (gptq, not gptq)
    assert not any("gptq" in each.form for each in block_candidates(block, "cuda"))


def test_the_goal_comes_first_and_then_every_level_has_its_turn():
    most = [6, 3, 3]
    tried = dict.fromkeys(range(3), 0)
    order = []
    while any(tried[number] < most[number] for number in tried):
        number = min((number for number in tried if tried[number] < most[number]),
                     key=lambda number: turn(number, tried[number], most[number]))
        tried[number] += 1
        order.append(number)
    assert order[:5] == [0, 0, 0, 1, 2]
    assert sorted(order) == [0] * 6 + [1] * 3 + [2] * 3
    assert 0 in order[5:8]


def test_the_first_of_those_spread_out_are_of_all_sizes():
    widths = [Candidate(64 * width, bare) for bare in (False, True) for width in range(1, 8)]
    several = [Candidate(0), *widths, Candidate(ratio=0.5)]
    found = spread_out(several)
    assert sorted(map(str, found)) == sorted(map(str, several))
    assert found[0].neurons == 64 * 4
    assert {each.neurons for each in found[:3]} > {64 * 2}
    assert max(each.neurons or 0 for each in found[:3]) >= 64 * 6
    assert spread_out([]) == []
