"""Plans and options: how they are written, and what is said of what cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest
import yaml
from ffnfold.graph.errors import InputError
from ffnfold.passes.base import BlockPass
from ffnfold.passes.blocks import ALL, Blocks
from ffnfold.passes.options import describe, given_options, make
from ffnfold.passes.plan import EXACT_PLAN, Plan, default_plan
from ffnfold.passes.registry import PASSES, make_pass
from hypothesis import given
from hypothesis import strategies as st

TRIAL = "trial:blocks=0+3-5,form=weight-only,rows=false"


@dataclass(frozen=True)
class Trial(BlockPass):
    """A pass with an option of each kind."""

    name: ClassVar[str] = "trial"
    form: Literal["dynamic", "weight-only"] = "dynamic"
    rows: bool = field(default=True, metadata={"help": "whether rows"})
    count: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction} is not between 0 and 1")


@pytest.fixture(autouse=True)
def _one_more_pass(monkeypatch):
    monkeypatch.setitem(PASSES, "trial", Trial)


@pytest.mark.parametrize("text", [TRIAL, " trial : form = weight-only , rows=off , blocks=0+3-5",
                                  "trial:rows=No,form=WEIGHT-ONLY,blocks=5+4+3+0"])
def test_one_pass_in_several_writings(text):
    [found] = Plan.parse([text])
    assert found == make_pass("trial", {"blocks": "0+3-5", "form": "weight-only", "rows": False})
    assert found == Trial(Blocks((0, 3, 4, 5)), "weight-only", False)


@pytest.mark.parametrize("text", [
    "[fold-bias, {trial: {blocks: 0+3-5, form: weight-only, rows: false}}]",
    "- fold-bias\n- trial:\n    blocks: [0, 3-5]\n    form: weight-only\n    rows: no\n",
    f"- fold-bias:\n- {TRIAL}\n",
    "passes:\n- {fold-bias: {}}\n- trial: {blocks: [0, 3, 4, 5], form: weight-only, rows: 'false'}\n"])
def test_one_plan_file_in_several_writings(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    assert Plan.load(tmp_path / "plan.yaml") == Plan.parse(["fold-bias", TRIAL])


@pytest.mark.parametrize("texts", [[], ["fold-bias"], [TRIAL, "fold-bias", TRIAL],
                                   ["trial:count=2,form=dynamic", "trial:fraction=0.25,rows=no"]])
def test_a_plan_written_and_read_is_the_same(texts):
    plan = Plan.parse(texts)
    assert Plan.from_entries(yaml.safe_load(plan.to_yaml())) == plan
    assert len(plan) == len(texts)


def test_only_what_differs_from_the_default_is_written():
    assert Plan.parse(["fold-bias", "trial:blocks=all,form=dynamic,count=", TRIAL]).entries() == [
        "fold-bias", "trial", {"trial": {"blocks": "0+3-5", "form": "weight-only", "rows": False}}]


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


@pytest.mark.parametrize("text", ["prune-bias:below=", "prune-bias:below=none", "prune-bias:below=None"])
def test_an_option_that_may_be_nothing_is_none(text):
    [each] = Plan.parse([text])
    assert each.below is None


def test_which_passes_need_feeds():
    plan = Plan.parse(["fold-bias", "remove-ffn:keep=nothing", "remove-ffn", "quantize-ffn", "linearize-ffn"])
    assert plan.needs_feeds == ["remove-ffn", "linearize-ffn"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_default_plan_needs_no_feeds_and_is_exact_up_to_its_last(target):
    plan = default_plan(target)
    assert plan.needs_feeds == []
    assert [each.name for each in plan][:-1] == [name for name in EXACT_PLAN if name != "fold-norm"]
    assert all(each.exact for each in plan.passes[:-1])
    assert not plan.passes[-1].exact


@pytest.mark.parametrize(("text", "said"), [
    ("melt-ffn", "there is no pass 'melt-ffn': the passes are "),
    ("", "there is no pass ''"),
    ("trial:", "write a pass as NAME or NAME:KEY=VALUE"),
    ("trial:form", "write a pass as NAME or NAME:KEY=VALUE"),
    ("trial:=dynamic", "write a pass as NAME or NAME:KEY=VALUE"),
    ("trial:form=dynamic,form=dynamic", "'form' is given twice"),
    ("trial:bits=4", "pass 'trial' has no option 'bits': it has blocks, form, rows, count, fraction"),
    ("fold-bias:blocks=1", "pass 'fold-bias' has no option 'blocks': it has none"),
    ("trial:form=static", "trial:form=static: choose one of dynamic, weight-only"),
    ("trial:rows=maybe", "trial:rows=maybe: not a true|false"),
    ("trial:blocks=first", "'first' is no list of blocks"),
    ("trial:count=1.5", "not a number or nothing"),
    ("trial:fraction=nan", "not a real number or nothing"),
    ("trial:fraction=inf", "not a real number or nothing"),
    ("trial:fraction=2", "pass 'trial': fraction=2.0 is not between 0 and 1")])
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
    ("- trial: {blocks: {a: 1}}", "is no list of blocks"), ("- trial: {blocks: [a]}", "is no list of blocks"),
    ("- trial: {count: [1]}", "not a number"), ("- trial: {form: null}", "option 'form' of 'trial' has no value"),
    ("- trial: {blocks: }", "option 'blocks' of 'trial' has no value"), ("- trial: {rows: 1, rows: 0}", "'rows' is given twice"),
    ("passes: []\npasses: []", "'passes' is given twice")])
def test_a_plan_file_that_cannot_be_read(tmp_path, text, said):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        Plan.load(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_that_may_be_nothing_may_have_no_value(tmp_path):
    (tmp_path / "plan.yaml").write_text("- trial: {count: null, fraction: }")
    assert Plan.load(tmp_path / "plan.yaml") == Plan.parse(["trial"])


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
    assert make(Trial, {"rows": value}).rows is expected


@pytest.mark.parametrize(("value", "expected"), [("2", 2), (2, 2), ("", None), (None, None)])
def test_a_number_or_nothing(value, expected):
    assert make(Trial, {"count": value}).count == expected


def test_the_description_of_options_is_that_of_the_fields():
    assert describe(Trial) == [
        {"name": "blocks", "type": "blocks", "help": "which blocks, e.g. 0+3-5", "default": "all"},
        {"name": "form", "type": "dynamic|weight-only", "help": "", "default": "dynamic"},
        {"name": "rows", "type": "true|false", "help": "whether rows", "default": True},
        {"name": "count", "type": "number or nothing", "help": "", "default": None},
        {"name": "fraction", "type": "real number or nothing", "help": "", "default": None}]


def test_no_blocks_at_all_are_written_none():
    [each] = Plan.parse(["quantize-ffn:blocks=none,also=attention"])
    assert each.blocks.indices == ()
    assert Plan.from_entries(Plan((each,)).entries()).passes == (each,)
