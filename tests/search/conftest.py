"""A model of three blocks, its feeds, and ``ffnfold search`` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from feed_files import write_feeds
from ffn_graphs import transformer

QUICK = """
from functools import partial
import ffnfold.passes.optimize as optimize
import ffnfold.search.latency as latency
from ffnfold.cli import main
if __name__ == "__main__":
    latency._MOST_ROUNDS, optimize.race = 15, partial(optimize.race, seconds=0.1)
    main()
"""
"""The command line, with so few rounds that these small models are timed in no time."""


@pytest.fixture
def model(tmp_path) -> Path:
    """Three blocks 64→256, gelu, on x [batch, tokens, 64]: large enough that what is left out is time saved."""
    return transformer(3, 64, 256, activation="gelu").save(tmp_path / "model.onnx")


@pytest.fixture
def feeds(tmp_path) -> Path:
    """Twelve feeds for ``model``."""
    return write_feeds(tmp_path / "feeds", 12, (4, 32, 64))


@pytest.fixture
def start(model, feeds, tmp_path):
    """Starts a search; options that are not given are a limit on the cosine, one thread and a cache in the test's folder."""

    def begin(output: str, *options: object, **settings) -> subprocess.Popen[str]:
        folder = tmp_path / output
        folder.mkdir(exist_ok=True)
        words = ["search", model, "-o", folder / "out.onnx", "--data", feeds, "--threads", 1, "--cache", tmp_path / "cache",
                 "--json", *(options or ("--max-drift", "cosine_mean=0.97"))]
        script = tmp_path / "quick.py"
        script.write_text(QUICK)
        return subprocess.Popen([sys.executable, str(script), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True, cwd=tmp_path, **settings)

    return begin
