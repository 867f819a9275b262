"""What the search for FFN blocks reads: graphs and small constants, never an embedding or a matrix."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import Sketch
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.graph.weights import StoredValues
from onnx import TensorProto

D, VOCABULARY = 64, 1000


def language_model(scaled: bool) -> Sketch:
    """Embedding and position added (and scaled), one block behind a projection, the embedding again as the head."""
    s = Sketch()
    ids = s.input("ids", ["batch", "tokens"], TensorProto.INT64)
    table = s.weight(s.numbers(VOCABULARY, D), "embedding")
    positions = s.op("Gather", s.weight(s.numbers(VOCABULARY, D), "positions"), s.op("CumSum", ids, s.weight(np.asarray(1))))
    x = s.op("Add", s.op("Gather", table, ids), positions)
    if scaled:
        x = s.op("Mul", x, s.number(8))
    x = s.op("Add", x, s.linear(s.op("Relu", x), D, D))
    x = s.op("Add", x, s.ffn(x, D, 4 * D, activation="gelu"))
    s.op("MatMul", x, s.op("Transpose", table, perm=[1, 0]), out=s.output("logits"))
    return s


@pytest.mark.parametrize("scaled", [False, True])
def test_an_embedding_is_not_read(tmp_path, monkeypatch, scaled):
    model = Model.load(language_model(scaled).save(tmp_path / "model.onnx"))
    read: list[int] = []
    for name in ("load", "tiles"):
        original = getattr(StoredValues, name)

        def noted(self, *arguments, original=original):
            read.append(self.nbytes)
            return original(self, *arguments)

        monkeypatch.setattr(StoredValues, name, noted)
    found = find_ffn_blocks(model)
    assert [(block.d_model, block.d_ff, block.activation.name) for block in found] == [(D, 4 * D, "gelu")]
    assert max(read, default=0) <= 4 * 4 * D  # a bias at most
    assert any("Gather mixes tokens" in each.reason for each in found.rejected)
