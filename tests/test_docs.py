"""What the README and the pages under docs/ say is so: commands parse, examples run, links lead somewhere, options agree."""

from __future__ import annotations

import configparser
import itertools
import re
import shlex
from pathlib import Path

import click
import contract
import numpy as np
import pytest
import yaml
from feed_files import write_feeds
from ffn_graphs import drift, run, transformer
from ffnfold.cli import main
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.passes.options import describe, make
from ffnfold.passes.plan import Plan, default_plan
from ffnfold.passes.registry import PASSES
from ffnfold.runtime import parse_limit
from ffnfold.runtime.grid import parse_grid
from ffnfold.runtime.limits import METRICS
from ffnfold.search.goal import parse_goal
from ffnfold.search.setup import parse_shapes

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("benchmarks", "cli", "docs", "graph", "models", "passes", "runtime", "search", "tests", ".ci")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
every_pass = pytest.mark.parametrize("name", sorted(PASSES))


def fenced(page: Path, language: str) -> list[str]:
    """The code blocks of a page that are marked with ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def inline(page: Path) -> list[str]:
    """What stands between backticks in running text and tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [found.replace("\\|", "|") for found in re.findall(r"`([^`\n]+)`", text)]


def commands(page: Path, program: str) -> list[list[str]]:
    """Every command line of ``program`` on a page, in code or between backticks, as words without the program."""
    lines = page.read_text(encoding="utf-8").splitlines()
    code = [line[4:] for line in lines if line.startswith("    ")] + [line[2:] for line in lines if line.startswith("$ ")]
    return [shlex.split(text, comments=True)[1:] for text in [*code, *inline(page)] if text.startswith(f"{program} ")]


def run_examples(page: Path) -> dict[str, object]:
    """Run the Python of a page from top to bottom; returns the names it made."""
    space: dict[str, object] = {"__name__": "example"}
    for code in fenced(page, "python"):
        exec(compile(code, str(page), "exec", dont_inherit=True), space)
    return space


def table(text: str, first: str) -> list[dict[str, str]] | None:
    """The rows of the first table in ``text`` whose first column is called ``first``, by column."""
    found = re.search(rf"^\| {first} \|.*\n\|[ -|]+\|\n((?:\|.*\n)*)", text, re.MULTILINE)
    if found is None:
        return None
    names = _cells(found.group(0).splitlines()[0])
    return [dict(zip(names, _cells(line), strict=True)) for line in found.group(1).splitlines()]


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def section(page: Path, heading: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page.name} has no section '{heading}'"
    return found.group(1)


def parse(words: list[str]) -> None:
    """Let click read a command line as the shell would hand it over, without running it; then read what is written in it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"there is no command '{name}'"
        command = found
    if isinstance(command, click.Group):
        known = {option for each in command.get_params(click.Context(command)) for option in each.opts}
        assert set(words) <= known
        return
    given = command.make_context(command.name, list(words)).params
    Plan.parse(given.get("passes") or ())
    for text in given.get("max_drift") or ():
        (parse_goal if command.name == "search" else parse_limit)(text)
    shapes = given.get("shapes") or ()
    parse_grid(parse_shapes(shapes)[1] if command.name == "search" else shapes)


@every_page
def test_every_command_line_parses(page):
    for words in commands(page, "ffnfold"):
        try:
            parse(words)
        except (click.ClickException, InputError) as error:
            pytest.fail(f"ffnfold {' '.join(words)}: {error}")


@every_page
def test_every_option_named_is_one(page):
    known = {option for command in every_command().values() for each in command.params for option in each.opts}
    known |= {"--help", "--version"}
    assert {text.split()[0].split("=")[0] for text in inline(page) if text.startswith("--")} <= known


@every_page
def test_every_pass_with_options_is_one(page):
    for text in inline(page):
        if re.fullmatch(r"[a-z][a-z-]+:[a-z_]+=\S+", text):
            Plan.parse([text])


@every_page
def test_every_make_target_is_one(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {words[0] for words in commands(page, "make")} <= targets


@every_page
def test_every_extra_is_one(page):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = re.findall(r"(?:\.|ffnfold)\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
    assert {extra for each in named for extra in each.split(",")} <= set(setup["options.extras_require"])


@every_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target


@every_page
def test_every_file_named_is_there(page):
    for text in inline(page):
        if text.split("/")[0] in FOLDERS and re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", text):
            assert (ROOT / text).exists(), text


@every_page
def test_every_benchmark_named_takes_its_options(page):
    for script, *words in commands(page, "python"):
        source = (ROOT / script).read_text(encoding="utf-8")
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source, f"{script} {word}"


def test_every_page_named_in_the_code_is_there():
    for file in (path for folder in ("api.py", "cli", "graph", "models", "passes", "runtime", "search")
                 for path in ([ROOT / folder] if folder.endswith(".py") else (ROOT / folder).glob("*.py"))):
        for name in re.findall(r"docs/[\w/-]+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{file.name} names {name}"


@every_page
def test_every_plan_file_shown_is_one(page):
    for text in fenced(page, "yaml"):
        assert len(Plan.from_entries(yaml.safe_load(text))) > 0


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder as the examples expect it: a model, its feeds, and what ``make demo`` leaves."""
    monkeypatch.chdir(tmp_path)
    for path, feeds in ((tmp_path / "model.onnx", tmp_path / "feeds"),
                        (tmp_path / "out/vit-s/original/model.onnx", tmp_path / "out/vit-s/original/feeds/report")):
        path.parent.mkdir(parents=True, exist_ok=True)
        transformer(12, activation="gelu").save(path)
        write_feeds(feeds, 2)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page, "python")], ids=lambda page: page.name)
def test_the_python_examples_run(page, workplace, capsys):
    run_examples(page)
    if page == README:
        printed = capsys.readouterr().out
        assert "11 /layer.11/ffn 8 32 gelu" in printed
        assert "quantize-ffn fired 4 []" in printed


def test_the_pass_of_the_page_prunes(workplace):
    space = run_examples(ROOT / "docs/writing-a-pass.md")
    before, after = Model.load("model.onnx"), Model.load("pruned.onnx")
    assert space["result"].fired == 12
    zeros = [sum(int((each._values.load() == 0).sum()) for each in model.graph.constants if len(each.shape) == 2)
             for model in (before, after)]
    assert zeros[0] == 0 < zeros[1]
    feed = dict(np.load("feeds/00.npz"))
    assert 0 < drift(run(before, feed), run(after, feed)) < 0.1
    assert make(space["PruneFFN"], {"below": "0.5", "blocks": "0+3"}).below == 0.5
    with pytest.raises(InputError, match="not between 0 and 1"):
        make(space["PruneFFN"], {"below": "2"})


@every_pass
def test_every_pass_has_a_page(name):
    page = ROOT / "docs" / "passes" / f"{name}.md"
    assert page.exists(), f"docs/passes/{name}.md is missing: what the pass does, when it does not fire, its options"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert ("Exact" if PASSES[name].exact else "Approximate") in text.split("## ")[0]
    section(page, "When it does not fire.*")
    used = {each.name for words in commands(page, "ffnfold") for each in Plan.parse(
        word for flag, word in itertools.pairwise(words) if flag == "-p")}
    assert name in used, "no command line on the page runs it"


@every_pass
def test_every_option_table_agrees_with_the_pass(name):
    options = describe(PASSES[name])
    text = section(ROOT / "docs" / "passes" / f"{name}.md", "Options")
    rows = table(text, "option")
    if not options:
        assert text.lstrip().startswith("None.")
        return
    assert rows is not None
    assert [row["option"] for row in rows] == [f"`{option['name']}`" for option in options]
    for row, option in zip(rows, options, strict=True):
        said = str(option["default"])
        assert row["default"].strip("`") == {"None": "none", "True": "true", "False": "false"}.get(said, said), option["name"]
        assert row.get("values", option["type"]) == option["type"]


@every_pass
def test_every_pass_has_a_row_in_the_readme(name):
    rows = {row["pass"]: row for row in table(section(README, "The passes"), "pass") or []}
    row = rows[f"[{name}](docs/passes/{name}.md)"]
    assert row["kind"] == ("exact" if PASSES[name].exact else "approximate")
    assert row["what it does"]
    assert row["when to use it"]


def test_no_page_and_no_row_is_about_a_pass_that_is_gone():
    assert {page.stem for page in (ROOT / "docs" / "passes").glob("*.md")} == set(PASSES)
    assert len(table(section(README, "The passes"), "pass") or []) == len(PASSES)


def test_the_default_plan_of_the_page_is_the_one_that_runs():
    cpu, cuda = table(section(ROOT / "docs/plans.md", "The default plan"), "target") or []
    assert Plan.parse(re.findall(r"`([^`]+)`", cpu["plan"])) == default_plan("cpu")
    assert Plan.parse(re.findall(r"`([^`]+)`", cuda["plan"])).passes[-1] == default_plan("cuda").passes[-1]


def every_command() -> dict[str, click.Command]:
    """Command name → command; those of a group as ``models list``."""
    found: dict[str, click.Command] = {}
    for name in main.list_commands(click.Context(main)):
        command = main.get_command(click.Context(main), name)
        inner = command.commands if isinstance(command, click.Group) else None
        found.update({f"{name} {key}": each for key, each in inner.items()} if inner else {name: command})
    return found


@pytest.mark.parametrize("name", sorted(every_command()))
def test_every_command_has_a_page_with_its_options(name):
    command = every_command()[name]
    outer, _, inner = name.partition(" ")
    page = ROOT / "docs" / "commands" / f"{outer}.md"
    assert page.read_text(encoding="utf-8").startswith(f"# ffnfold {outer}\n")
    assert name.split() in [words[:len(name.split())] for words in commands(page, "ffnfold")]
    rows = table(section(page, f"Options of {inner}" if inner else "Options"), "option")
    options = [each for each in command.params if isinstance(each, click.Option)]
    expected = {", ".join(f"`{spelling}`" for spelling in each.opts): _default(each) for each in options}
    assert {row["option"]: row["default"].strip("`") for row in rows or []} == expected


def _default(option: click.Option) -> str:
    if option.required:
        return "required"
    return str(option.default) if isinstance(option.default, (str, Path)) and not option.is_flag else ""


@pytest.mark.parametrize(("page", "keys"), [
    ("inspect", [*contract.INSPECT, *contract.BLOCK]), ("optimize", [*contract.OPTIMIZE, *contract.PASS, *contract.RATIO]),
    ("verify", [*contract.VERIFY, *contract.METRICS]), ("bench", [*contract.BENCH, *contract.TIMES, *contract.RATIO])])
def test_the_json_of_the_page_has_the_keys_of_the_contract(page, keys):
    text = section(ROOT / "docs" / "commands" / f"{page}.md", "JSON")
    assert not [key for key in keys if f'"{key}"' not in text]


def test_the_readme_explains_every_metric():
    text = section(README, "How to read the drift")
    assert not [metric for metric in METRICS if f"`{metric}`" not in text]
