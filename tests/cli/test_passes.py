"""``ffnfold passes``."""

from __future__ import annotations

from ffnfold.passes.options import describe
from ffnfold.passes.registry import PASSES


def test_json_lists_every_pass_with_its_options(cli):
    outcome = cli("passes", "--json")
    listed = outcome.json["passes"]
    assert outcome.code == 0
    assert [each["name"] for each in listed] == sorted(PASSES)
    for each in listed:
        assert list(each) == ["name", "exact", "summary", "needs_feeds", "options"]
        assert each["summary"]
        assert all(list(option) == ["name", "type", "help", "default"] for option in each["options"])


def test_every_option_has_a_help(cli):
    for each in cli("passes", "--json").json["passes"]:
        for option in each["options"]:
            assert option["help"], f"{each['name']}:{option['name']}"


def test_what_is_exact(cli):
    exact = {each["name"]: each["exact"] for each in cli("passes", "--json").json["passes"]}
    assert exact["fold-bias"] is True
    assert exact["fuse-matmul"] is True
    assert not any(exact[name] for name in ("remove-ffn", "linearize-ffn", "quantize-ffn"))


def test_the_table_names_passes_and_options(cli):
    out = cli("passes").out
    for name, kind in PASSES.items():
        assert name in out
        assert all(f"{option['name']}=" in out for option in describe(kind))
