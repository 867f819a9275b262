"""Tests on an NVIDIA GPU. ``FFNFOLD_CUDA_TESTS=cpu`` runs on the CPU what can be, to see that the tests themselves work."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from cuda_models import everything, write_x
from ffnfold.cli import main

ON_CPU = os.environ.get("FFNFOLD_CUDA_TESTS") == "cpu"


@pytest.fixture(autouse=True)
def _skip_without_a_gpu(request):
    if request.node.get_closest_marker("cuda") is None or (ON_CPU and "provider" in request.fixturenames):
        return
    if ON_CPU or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs an NVIDIA GPU and onnxruntime-gpu")


@pytest.fixture
def provider() -> str:
    """``cuda``. A test that asks for it can also be run on the CPU; one that does not would say nothing there."""
    return "cpu" if ON_CPU else "cuda"


@pytest.fixture(params=["float32", "float16"])
def dtype(request) -> np.dtype:
    return np.dtype(request.param)


@dataclass(frozen=True)
class Outcome:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs ``ffnfold`` with arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> Outcome:
        result = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def model(tmp_path) -> Path:
    """Three FFN blocks, float32."""
    return everything().save(tmp_path / "model.onnx")


@pytest.fixture
def feeds(tmp_path) -> Path:
    """Forty feeds of it."""
    return write_x(tmp_path / "feeds", 40)
