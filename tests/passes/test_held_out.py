"""Which feeds choose the ridge and which are fitted to."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import transformer
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.passes.base import Context
from ffnfold.passes.fitting.evidence import Evidence, Streams
from ffnfold.passes.ledger import Ledger
from ffnfold.runtime import Feeds

D = 8


def numbered(count: int) -> Feeds:
    """Feeds whose every token is the number of the feed, along a direction that the norms keep."""
    return Feeds.of([{"x": np.outer(np.ones(3), np.sin(np.arange(D) + number)).reshape(1, 3, D).astype(np.float32)}
                     for number in range(count)])


@pytest.mark.parametrize(("count", "runs", "held"), [
    (50, False, lambda number: number % 5 == 4), (50, True, lambda number: number // 2 % 5 == 4),
    (20, True, lambda number: number % 5 == 4), (74, True, lambda number: number * 25 // 74 % 5 == 4)])
def test_runs_of_neighbours(tmp_path, count, runs, held):
    model = Model.load(transformer(1, D, 32).save(tmp_path / "m.onnx"))
    found = evidence(model, numbered(count), runs=runs)
    chosen = [number for number in range(count) if held(number)]
    alone = evidence(model, Feeds.of([numbered(count)[number] for number in chosen]))
    assert (found.held_out.rows, found.fit.rows) == (3 * len(chosen), 3 * (count - len(chosen)))
    np.testing.assert_allclose(found.held_out.mean, alone.everything().mean, rtol=1e-6, atol=1e-6)


def evidence(model: Model, feeds: Feeds, *, runs: bool = False) -> Evidence:
    [block] = find_ffn_blocks(model)
    with Streams(model, Context(feeds, feeds, ledger=Ledger(model)), runs=runs) as streams:
        return streams.evidence(block, inputs=True, neurons=True, weight="none", target="own")
