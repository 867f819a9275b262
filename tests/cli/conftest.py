"""A small model with its feeds, and the command line in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from feed_files import write_feeds
from ffn_graphs import transformer
from ffnfold.cli import main, output
from ffnfold.passes.proof import contributions


@dataclass(frozen=True)
class Outcome:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The one JSON object on stdout; fails if anything else is there."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs ``ffnfold`` with arguments, in an empty folder; whatever it raises beside an exit code fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contributions, "SECONDS", 0.1)
    monkeypatch.setattr(output.console, "width", 160)  # whatever the terminal is, and however long the names of the folders

    def run(*arguments) -> Outcome:
        result = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def refused(cli):
    """Runs a command that must be refused: exit code 2, one line on stderr, nothing on stdout. Returns the line."""

    def run(*arguments) -> str:
        outcome = cli(*arguments)
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        return only_line(outcome.err)

    return run


@pytest.fixture
def refused_and_unchanged(refused, folder):
    """``refused``, and every file in the folder is what it was."""

    def run(*arguments) -> str:
        before = contents(folder)
        line = refused(*arguments)
        assert contents(folder) == before
        return line

    return run


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def only_line(text: str) -> str:
    """The line of an error."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path


@pytest.fixture
def model(tmp_path) -> Path:
    """Three blocks 8→32, gelu, on x [batch, tokens, 8]."""
    return transformer(3, activation="gelu").save(tmp_path / "model.onnx")


@pytest.fixture
def feeds(tmp_path) -> Path:
    """Twelve feeds for ``model``."""
    return write_feeds(tmp_path / "feeds", 12)
