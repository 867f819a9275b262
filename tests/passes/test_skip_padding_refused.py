"""skip-padding: models that read padding, or do not say what it is, are left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ffn_graphs import Sketch, ops
from ffnfold.runtime import Feeds
from masked_encoders import MASKS, ROWS, D, Encoder, feed_of, skipped
from onnx import TensorProto


def refusal(s: Sketch, folder: Any, fit: Feeds | None = None) -> str:
    before = s.model()
    model, result = skipped(s, folder, fit=fit)
    assert result.fired == 0
    assert ops(model) == ops(before)
    [refused] = result.refused
    return f"{refused.value}: {refused.reason}"


@pytest.mark.parametrize(("dims", "said"), [
    (("batch", "past_and_tokens"), "they must say to be of one batch"), ((None, None), "they must say to be of one batch"),
    (("batch", "tokens", 1), "they must say to be of one batch"), (None, "they must say to be of one batch")])
def test_a_mask_of_other_dimensions_is_refused(tmp_path, dims, said):
    s = Encoder(dims=dims, masked=False)
    s.layers(1)
    s.give_rows()
    found = refusal(s, tmp_path)
    assert found.startswith("attention_mask: ")
    assert said in found


def test_a_model_without_a_mask_is_refused(tmp_path):
    s = Sketch()
    x = s.input("x", ROWS)
    s.op("Identity", s.ffn(x), out=s.output("y", ROWS))
    assert "there is no input 'attention_mask'" in refusal(s, tmp_path)


def test_a_mean_over_padding_is_refused(tmp_path):
    s = Encoder()
    s.layers()
    said = refusal(s.give_mean(masked=False), tmp_path)
    assert said.startswith("mean: it reads rows that are padding")


def test_attention_that_sees_padding_is_refused(tmp_path):
    s = Encoder(masked=False)
    s.layers()
    assert refusal(s.give_rows(), tmp_path).startswith("y: it reads rows that are padding")


def test_what_integers_round_hides_no_reader_of_padding(tmp_path):
    s = Encoder()
    s.layers()
    s.give_mean(masked=False)
    _, result = skipped(s, tmp_path, ["quantize-ffn:row_scale=false", "skip-padding"])
    assert result.fired == 0
    assert "reads rows that are padding" in result.refused[0].reason


def test_the_first_token_may_be_read_where_feeds_say_that_it_counts(tmp_path):
    s = Encoder()
    s.op("Gather", s.layers(), s.weight(np.asarray(0, np.int64)), out=s.output("first", ["batch", D]), axis=1)
    right, left = (Feeds.of([feed_of(MASKS["none"]), feed_of(MASKS[kind])]) for kind in ("right", "left"))
    for fit in (None, right):
        result = skipped(s, tmp_path, fit=fit)[1]
        assert result.fired
        assert result.notes == ("output 'first' comes out otherwise where texts are padded in front",)
    assert refusal(s, tmp_path, left).startswith("first: it reads rows that are padding")


def test_a_batch_of_one_is_tried_with_padding_too(tmp_path):
    s = Encoder(dims=(1, "tokens"))
    s.inputs[0].type.tensor_type.shape.dim[0].dim_value = 1
    s.layers()
    assert refusal(s.give_mean(masked=False), tmp_path).startswith("mean: it reads rows that are padding")


def test_a_decoder_beside_it_is_refused(tmp_path):
    s = Encoder()
    s.layers()
    s.op("Identity", s.input("decoder_input_ids", ["batch", "tokens"], TensorProto.INT64),
         out=s.output("same", None, TensorProto.INT64))
    assert "'decoder_input_ids' has as many tokens" in refusal(s.give_rows(), tmp_path)


def test_the_last_token_may_be_read_where_feeds_are_padded_in_front(tmp_path):
    s = Encoder()
    s.op("Gather", s.layers(), s.weight(np.asarray(-1, np.int64)), out=s.output("last", ["batch", D]), axis=1)
    assert refusal(s, tmp_path).startswith("last: it reads rows that are padding")
    result = skipped(s, tmp_path, fit=Feeds.of([feed_of(MASKS["left"])]))[1]
    assert result.fired
    assert result.notes == ("output 'last' comes out otherwise where texts are padded at the end",)


def test_one_text_that_is_padded_in_front_hides_no_reader_of_padding(tmp_path):
    s = Encoder()
    s.layers()
    fit = Feeds.of([feed_of([[0, 0, 1, 1, 1, 1, 1, 1]])])
    _, result = skipped(s.give_mean(masked=False), tmp_path, ["quantize-ffn:row_scale=false,smooth=none", "skip-padding"], fit)
    assert result.fired == 0
    assert "reads rows that are padding" in result.refused[0].reason


def test_another_sequence_with_a_mask_of_its_own_is_refused(tmp_path):
    s = Encoder()
    s.layers(1)
    s.give_rows("documents")
    for node in s.nodes:
        node.name = node.name and f"/documents{node.name}"
        for names in (node.input, node.output):
            names[:] = ["documents_0" if name == "stream_0" else name for name in names]
    s.ids, s.mask = s.input("query_ids", ["batch", "tokens"], TensorProto.INT64), s.input("query_mask", ["batch", "tokens"])
    s.floats = s.mask
    s.last = s.embedded()
    s.layers(1)
    s.give_mean()
    fit = feed_of([[1, 1, 1, 0], [1, 1, 0, 0]])
    fit |= {"query_ids": fit["input_ids"], "query_mask": np.asarray([[1, 1, 0, 0], [1, 0, 0, 0]], np.float32)}
    assert "padding" in refusal(s, tmp_path, Feeds.of([fit]))


def test_nothing_to_pack_is_refused(tmp_path):
    s = Encoder()
    s.op("Identity", s.last, out=s.output("y", ROWS))
    assert "no linear works on values [batch, tokens, d] or" in refusal(s, tmp_path)


def test_an_old_opset_is_refused(tmp_path):
    s = Sketch(10)
    s.input("input_ids", ["batch", "tokens"], TensorProto.INT64)
    s.op("Identity", s.input("attention_mask", ["batch", "tokens"]), out=s.output("y"))
    assert "opset 10 has no CumSum" in refusal(s, tmp_path)
