"""The race: what it returns. No test says how fast anything is."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from contract import TIMES
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.runtime import Feeds, race
from ffnfold.runtime.timing import _ratio
from onnx import TensorProto


@pytest.fixture
def entry(workshop, random):
    path = workshop.linear(random.standard_normal((16, 40), np.float32))
    return path, Feeds.of([{"x": random.standard_normal((n, 3, 16), np.float32)} for n in (1, 2)])


def test_a_race_returns_the_contract(entry):
    path, feeds = entry
    told = []
    result = json.loads(json.dumps(race([path, Model.load(path), path], feeds, threads=1, seconds=0.3, min_rounds=5,
                                        progress=lambda done, total: told.append((done, total))), allow_nan=False))
    assert list(result) == ["machine", "provider", "models", "ratios"]
    assert {"cpu", "cores", "os", "onnxruntime", "threads", "gpu", "tf32", "feeds", "rounds"} <= set(result["machine"])
    assert (result["provider"], result["machine"]["threads"], result["machine"]["feeds"]) == ("cpu", 1, "real")
    assert [each["model"] for each in result["models"]] == [str(path)] * 3
    for each in result["models"]:
        assert list(each) == TIMES
        assert 0 < each["p50_ms"] <= each["p90_ms"] <= each["p99_ms"]
        assert each["nodes_by_provider"] == {"CPUExecutionProvider": 2}
        assert each["memcpy_nodes"] == 0
    assert result["models"][0]["bytes"] == path.stat().st_size
    assert [list(each) for each in result["ratios"]] == [["model", "speedup", "low", "high"]] * 2
    assert all(0 < each["low"] <= each["speedup"] <= each["high"] for each in result["ratios"])
    assert told
    assert all(done <= total for done, total in told)


def test_external_data_counts_as_bytes(workshop, random):
    path = workshop.linear(random.standard_normal((16, 40), np.float32), save_as_external_data=True, location="weights.bin",
                           size_threshold=0)
    feeds = Feeds.of([{"x": np.ones((1, 1, 16), np.float32)}])
    result = race([path], feeds, seconds=0, min_rounds=2)
    assert result["models"][0]["bytes"] == path.stat().st_size + 16 * 40 * 4
    assert (result["ratios"], result["machine"]["rounds"]) == ([], 2)


def test_types_that_numpy_lacks_can_be_timed(workshop):
    path = workshop.identity(TensorProto.BFLOAT16, ["n", 3])
    feeds = Feeds.of([{"x": np.ones((2, 3), ml_dtypes.bfloat16)}], synthetic=True)
    assert race([path], feeds, seconds=0, min_rounds=2)["machine"]["feeds"] == "synthetic"


def test_the_ratio_is_the_median_and_its_interval_holds_it(random):
    ratios = 2 + 0.1 * random.standard_normal(400)
    found = _ratio(ratios)
    assert found["speedup"] == np.median(ratios)
    assert 1.9 < found["low"] < found["speedup"] < found["high"] < 2.1
    assert found == _ratio(ratios)


def test_what_cannot_be_timed_is_said_in_one_line(entry, tmp_path, one_line):
    path, feeds = entry
    for attempt, word in ((lambda: race([], feeds), "model"), (lambda: race([path], feeds[:0]), "inputs"),
                          (lambda: race([path], feeds, cuda_graph=True), "--provider cuda"),
                          (lambda: race([path, tmp_path / "none.onnx"], feeds), "none.onnx"),
                          (lambda: race([path], Feeds.of([{"x": np.ones((1, 1, 3), np.float32)}])), "linear.onnx"),
                          (lambda: race([path], Feeds.of([{"z": np.ones(3)}])), "z")):
        with pytest.raises(InputError) as caught:
            attempt()
        one_line(caught.value, word)


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_race_on_cuda(entry, cuda_graph):
    path, feeds = entry
    result = race([path, Model.load(path)], feeds, provider="cuda", cuda_graph=cuda_graph, seconds=0.3, min_rounds=5)
    assert result["machine"]["gpu"]
    assert result["machine"]["tf32"] is False
    assert result["models"][0]["nodes_by_provider"] == {"CUDAExecutionProvider": 2}
    assert result["ratios"][0]["speedup"] > 0
