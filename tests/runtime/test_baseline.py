"""Speed-ups against those of an earlier run."""

from __future__ import annotations

import json

import pytest
from ffnfold.graph.errors import InputError
from ffnfold.runtime.baseline import Baseline


@pytest.fixture
def load(tmp_path):
    def load(ratios) -> Baseline:
        path = tmp_path / "earlier.json"
        path.write_text(json.dumps({"ratios": ratios}))
        return Baseline.load(path)

    return load


def test_only_what_fell_behind_by_more_is_said(load):
    earlier = load([{"model": "a.onnx", "speedup": 2.0}, {"model": "b.onnx", "speedup": 1.0}])
    now = [{"model": "a.onnx", "speedup": 1.85}, {"model": "b.onnx", "speedup": 3.0}]
    assert earlier.behind(now, 10) == []
    (said,) = earlier.behind(now, 5)
    assert said == "a.onnx: speed-up 1.850, was 2.000: more than 5 % behind"


def test_the_point_of_the_grid_counts(load):
    earlier = load([{"model": "a.onnx", "speedup": speedup, "shape": {"x": [1, tokens]}, "threads": 2}
                    for tokens, speedup in ((1, 1.0), (128, 2.0))])
    now = {"model": "a.onnx", "speedup": 1.5, "shape": {"x": [1, 128]}, "threads": 2}
    assert "a.onnx at x 1x128, 2 threads: speed-up 1.500, was 2.000" in earlier.behind([now], 5)[0]
    assert earlier.behind([{**now, "shape": {"x": [1, 1]}}], 5) == []
    assert "has no speed-up to compare with" in earlier.behind([{**now, "threads": 4}], 5)[0]


def test_the_same_file_in_another_folder(load):
    earlier = load([{"model": "/there/a.onnx", "speedup": 2.0}])
    earlier.check(["first.onnx", "/here/a.onnx"])
    assert len(earlier.behind([{"model": "/here/a.onnx", "speedup": 1.0}], 5)) == 1


def test_a_file_name_that_two_models_share_is_not_guessed(load):
    earlier = load([{"model": "/one/model.onnx", "speedup": 2.0}, {"model": "/two/model.onnx", "speedup": 3.0}])
    assert "has no speed-up to compare with" in earlier.behind([{"model": "/here/model.onnx", "speedup": 1.0}], 5)[0]


@pytest.mark.parametrize("models", [["a.onnx"], ["a.onnx", "c.onnx"]])
def test_nothing_to_compare_is_said_before_the_run(load, models):
    with pytest.raises(InputError):
        load([{"model": "a.onnx", "speedup": 1.0}]).check(models)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a":' * 5000, '{"ratios": 3}',
                                     '{"ratios": [{}]}', '{"ratios": [{"model": "a"}]}', '{"ratios": ["a"]}',
                                     '{"ratios": [{"model": "a", "speedup": null}]}'])
def test_other_files_are_refused(tmp_path, content, one_line):
    path = tmp_path / "earlier.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        Baseline.load(path)
    one_line(caught.value, "is no result of 'ffnfold bench --json'")
