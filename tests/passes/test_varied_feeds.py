"""Varied copies of token feeds: what is replaced, what stays, and that they help a fit from few sentences."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch, drift, run
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.passes.fitting.varied_feeds import token_inputs, varied
from ffnfold.runtime import Feeds
from onnx import TensorProto
from rewriting import rewrite

D, WORDS = 8, 400


def embedded(*, cast: bool = False) -> Sketch:
    """Words and positions are looked up, then comes one block. Tokens of a row see the mean of the row."""
    s = Sketch()
    ids, places = (s.input(name, ["batch", "tokens"], TensorProto.INT64) for name in ("ids", "places"))
    words = s.op("Gather", s.weight(3 * s.numbers(WORDS, D)), s.op("Cast", ids, to=6) if cast else ids)
    x = s.op("Add", words, s.op("Gather", s.weight(s.numbers(WORDS, D)), places))
    x = s.op("Add", x, s.op("ReduceMean", x, axes=[1], keepdims=1))
    s.op("Add", x, s.ffn(s.norm(x, D), activation="gelu"), out=s.output("y"))
    return s


def token_feeds(count: int, rows: int, seed: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        ids = random.integers(10, 60, (rows, 12))
        ids[:, 0], ids[:, 6] = 1, 2
        feeds.append({"ids": ids, "places": np.tile(np.arange(12), (rows, 1))})
    return feeds


@pytest.mark.parametrize("cast", [False, True])
def test_inputs_that_are_looked_up_in_a_large_table(tmp_path, cast):
    embedded(cast=cast).save(tmp_path / "m.onnx")
    assert token_inputs(Model.load(tmp_path / "m.onnx")) == {"ids": WORDS, "places": WORDS}


def test_some_words_are_others_and_all_else_stays(tmp_path):
    embedded().save(tmp_path / "m.onnx")
    feeds = token_feeds(2, 5, seed=0)
    feeds[0]["attention_mask"] = np.repeat([[1] * 8 + [0] * 4], 5, axis=0)
    found = varied(Model.load(tmp_path / "m.onnx"), Feeds.of(feeds), 3)
    assert len(found) == 8
    for number, feed in enumerate(feeds):
        np.testing.assert_array_equal(found[number]["ids"], feed["ids"])
        for copy in (1, 2, 3):
            other = found[2 * copy + number]
            changed = other["ids"] != feed["ids"]
            assert 0 < changed.mean() < 0.5
            assert not changed[:, [0, 6]].any()
            np.testing.assert_array_equal(other["places"], feed["places"])
            assert other["ids"].dtype == feed["ids"].dtype
    assert (found[2]["ids"] != found[4]["ids"]).any()
    assert all((found[copy]["ids"][:, 8:] == feeds[0]["ids"][:, 8:]).all() for copy in (2, 4, 6))
    np.testing.assert_array_equal(found[3]["ids"], varied(Model.load(tmp_path / "m.onnx"), Feeds.of(feeds), 1)[3]["ids"])


def test_a_model_without_token_inputs_has_no_varied_copies(tmp_path):
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    s.op("Add", x, s.ffn(x, activation="gelu"), out=s.output("y"))
    s.save(tmp_path / "m.onnx")
    assert len(varied(Model.load(tmp_path / "m.onnx"), Feeds.of([{"x": np.zeros((1, 2, D), np.float32)}]), 2)) == 1


def test_a_fit_from_few_sentences_is_better_with_varied_copies(tmp_path):
    s = embedded()
    report = {"ids": np.random.default_rng(5).integers(10, WORDS, (20, 12)), "places": np.tile(np.arange(12), (20, 1))}
    before, errors = run(s.model(), report), []
    for vary in (0, 10):
        model, [result] = rewrite(s, tmp_path, f"slim-ffn:keep=20,multiple=1,vary={vary}", fit=token_feeds(2, 4, seed=1))
        assert (result.fired, result.refused) == (1, [])
        errors.append(drift(before, run(model, report)))
    assert errors[1] < 0.9 * errors[0]


def test_less_than_no_copies_is_refused(tmp_path):
    with pytest.raises(InputError, match="vary=-1"):
        rewrite(embedded(), tmp_path, "linearize-ffn:vary=-1", fit=token_feeds(1, 1, seed=1))
