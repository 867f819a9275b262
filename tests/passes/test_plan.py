"""Plans and options: how they are written, and what is said of what cannot be read."""

from __future__ import annotations

import pytest
import yaml
from ffnfold.graph.errors import InputError
from ffnfold.passes.blocks import ALL, Blocks
from ffnfold.passes.options import describe, given_options, make
from ffnfold.passes.plan import EXACT_PLAN, Plan, default_plan
from ffnfold.passes.registry import PASSES, make_pass
from hypothesis import given
from hypothesis import strategies as st

QUANTIZE = "quantize-ffn:blocks=0+3-5,form=weight-only,row_scale=false"


@pytest.mark.parametrize("text", [QUANTIZE, " quantize-ffn : form = weight-only , row_scale=off , blocks=0+3-5",
                                  "quantize-ffn:row_scale=No,form=WEIGHT-ONLY,blocks=5+4+3+0"])
def test_one_pass_in_several_writings(text):
    [found] = Plan.parse([text])
    assert found == make_pass("quantize-ffn", {"blocks": "0+3-5", "form": "weight-only", "row_scale": False})


@pytest.mark.parametrize("text", [
    "[fold-bias, {quantize-ffn: {blocks: 0+3-5, form: weight-only, row_scale: false}}]",
    "- fold-bias\n- quantize-ffn:\n    blocks: [0, 3-5]\n    form: weight-only\n    row_scale: no\n",
    f"- fold-bias:\n- {QUANTIZE}\n",
    "passes:\n- {fold-bias: {}}\n- quantize-ffn: {blocks: [0, 3, 4, 5], form: weight-only, row_scale: 'false'}\n"])
def test_one_plan_file_in_several_writings(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    assert Plan.load(tmp_path / "plan.yaml") == Plan.parse(["fold-bias", QUANTIZE])


@pytest.mark.parametrize("texts", [[], ["fold-bias"], [QUANTIZE, "fold-bias", QUANTIZE],
                                   ["remove-ffn:count=2,by=output", "remove-ffn:fraction=0.25,keep=nothing"]])
def test_a_plan_written_and_read_is_the_same(texts):
    plan = Plan.parse(texts)
    assert Plan.from_entries(yaml.safe_load(plan.to_yaml())) == plan
    assert len(plan) == len(texts)


def test_only_what_differs_from_the_default_is_written():
    assert Plan.parse(["fold-bias", "quantize-ffn:blocks=all,form=dynamic", QUANTIZE]).entries() == [
        "fold-bias", "quantize-ffn", {"quantize-ffn": {"blocks": "0+3-5", "form": "weight-only", "row_scale": False}}]


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_option_of_every_pass_reads_its_default_back(name):
    defaults = {str(option["name"]): option["default"] for option in describe(PASSES[name])}
    given = {key: "" if default is None else str(default) for key, default in defaults.items()}
    assert make_pass(name, given) == make_pass(name, {})
    assert given_options(make_pass(name, {})) == {}


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_pass_is_known_by_its_name(name):
    assert make_pass(name, {}).name == name
    assert PASSES[name].__doc__


def test_which_passes_need_feeds():
    plan = Plan.parse(["fold-bias", "remove-ffn:keep=nothing", "remove-ffn", "quantize-ffn", "linearize-ffn"])
    assert plan.needs_feeds == ["remove-ffn", "linearize-ffn"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_default_plan_needs_no_feeds_and_is_exact_up_to_its_last(target):
    plan = default_plan(target)
    assert plan.needs_feeds == []
    assert [each.name for each in plan][:-1] == list(EXACT_PLAN)
    assert all(each.exact for each in plan.passes[:-1])
    assert not plan.passes[-1].exact


@pytest.mark.parametrize(("text", "said"), [
    ("melt-ffn", "there is no pass 'melt-ffn': the passes are "),
    ("", "there is no pass ''"),
    ("quantize-ffn:", "write a pass as NAME or NAME:KEY=VALUE"),
    ("quantize-ffn:form", "write a pass as NAME or NAME:KEY=VALUE"),
    ("quantize-ffn:=dynamic", "write a pass as NAME or NAME:KEY=VALUE"),
    ("quantize-ffn:form=dynamic,form=dynamic", "'form' is given twice"),
    ("quantize-ffn:bits=4", "pass 'quantize-ffn' has no option 'bits': it has blocks, form, row_scale"),
    ("fold-bias:blocks=1", "pass 'fold-bias' has no option 'blocks': it has none"),
    ("quantize-ffn:form=static", "quantize-ffn:form=static: choose one of dynamic, weight-only"),
    ("quantize-ffn:row_scale=maybe", "quantize-ffn:row_scale=maybe: not a true|false"),
    ("quantize-ffn:blocks=first", "'first' is no list of blocks"),
    ("remove-ffn:count=1.5", "not a number or nothing"),
    ("remove-ffn:fraction=nan", "not a real number or nothing"),
    ("remove-ffn:fraction=inf", "not a real number or nothing"),
    ("remove-ffn:fraction=2", "pass 'remove-ffn': fraction=2.0 is not between 0 and 1"),
    ("drop-neurons:multiple=0", "pass 'drop-neurons': multiple must be 1 or more")])
def test_a_pass_that_cannot_be_read(text, said):
    with pytest.raises(InputError) as caught:
        Plan.parse([text])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [
    ("", "a plan is a list of passes"), ("fold-bias", "a plan is a list of passes"), ("{fold-bias: {}}", "a plan is a list of"),
    ("- [fold-bias]", "is no pass"), ("- 3", "is no pass"), ("- {a: {}, b: {}}", "is no pass"),
    ("- {fold-bias: 3}", "is no pass"),
    ("- fold-bias\n  - x: [", "not YAML"), ("- !!python/object/apply:os.system ['true']", "not YAML"),
    ("- quantize-ffn: {blocks: {a: 1}}", "is no list of blocks"), ("- quantize-ffn: {blocks: [a]}", "is no list of blocks"),
    ("- remove-ffn: {count: [1]}", "not a number"), ("- quantize-ffn: {form: null}", "choose one of")])
def test_a_plan_file_that_cannot_be_read(tmp_path, text, said):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        Plan.load(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="no such plan file"):
        Plan.load(tmp_path / "none.yaml")
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        Plan.load(tmp_path)


@pytest.mark.parametrize(("text", "indices"), [
    ("all", None), (None, None), ("3", (3,)), (3, (3,)), ("0+3-5", (0, 3, 4, 5)), ("5+3-4+3", (3, 4, 5)), ("2-2", (2,)),
    (" 1 + 2 ", (1, 2)), ([0, "3-5"], (0, 3, 4, 5)), ([], ()), ((7,), (7,))])
def test_lists_of_blocks(text, indices):
    assert Blocks.parse(text).indices == indices


@pytest.mark.parametrize("text", ["", "+", "1+", "-1", "1-", "5-3", "a", "1.5", "0x2", "1,2", "٣-", True, {"a": 1}, "0-99999999",
                                  "9" * 30, "²"])
def test_what_is_no_list_of_blocks(text):
    with pytest.raises(InputError, match=r"blocks|backwards"):
        Blocks.parse(text)


@given(st.lists(st.integers(0, 60)))
def test_a_list_of_blocks_written_and_read_is_the_same(indices):
    blocks = Blocks(tuple(sorted(set(indices))))
    if indices:
        assert Blocks.parse(str(blocks)) == blocks
    assert [index in blocks for index in range(62)] == [index in indices for index in range(62)]


def test_all_blocks_holds_every_index():
    assert str(ALL) == "all"
    assert Blocks.parse(str(ALL)) == ALL
    assert 10**6 in ALL


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("Yes", True), ("1", True), (True, True), ("OFF", False),
                                                 (0, False), (False, False)])
def test_truth_in_several_writings(value, expected):
    assert make(PASSES["quantize-ffn"], {"row_scale": value}).row_scale is expected


@pytest.mark.parametrize(("value", "expected"), [("2", 2), (2, 2), ("", None), (None, None)])
def test_a_number_or_nothing(value, expected):
    assert make(PASSES["remove-ffn"], {"count": value}).count == expected
