"""The head that gives logits is a unit of its own."""

from __future__ import annotations

from functools import partial

import ffnfold.passes.optimize as optimize
import ffnfold.search.latency as latency
import pytest
from feed_files import write_feeds
from ffn_graphs import Sketch
from ffnfold.search import SearchJob, search_file

D, FF, WORDS = 64, 128, 4096


def with_head() -> Sketch:
    """Two blocks and a head that has nearly all of the weights."""
    s = Sketch()
    x = s.input("x", ["batch", "tokens", D])
    for _ in range(2):
        x = s.op("Add", x, s.ffn(s.norm(x, D), D, FF, activation="gelu"))
    s.op("Identity", s.linear(s.norm(x, D), D, WORDS, bias=False), out=s.output("logits"))
    return s


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_head_is_rounded_where_that_is_what_makes_the_model_small(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_MOST_ROUNDS", 15)
    monkeypatch.setattr(optimize, "race", partial(optimize.race, seconds=0.1))
    model = with_head().save(tmp_path / "model.onnx")
    job = SearchJob(model, tmp_path / "out.onnx", write_feeds(tmp_path / "feeds", 12, (4, 32, D)), threads=1,
                    max_bytes=model.stat().st_size // 2, cache=tmp_path / "cache", beside=False, minutes=2)
    report = search_file(job)
    assert report["ok"], report["notes"]
    assert (tmp_path / "out.onnx").stat().st_size <= job.max_bytes
    [chosen] = [point for point in report["front"] if point["chosen"]]
    assert chosen["choice"]["-2"] != "keep"
    assert any(entry["quantize-ffn"].get("also") in ("head", "everything") for entry in report["plan"]
               if isinstance(entry, dict) and "quantize-ffn" in entry)
    assert report["drift"]["outputs"]["logits"]["cosine_mean"] > 0.99
