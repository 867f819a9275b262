"""skip-padding: rows of padding are not computed, and the others stay the same."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_graphs import ops, run
from ffnfold.graph.model import Model
from ffnfold.passes.plan import Plan
from ffnfold.passes.proof.equivalence import equivalence
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, open_session
from masked_encoders import MASKS, PRODUCTS, ROWS, WORDS, D, Encoder, apart, encoder, feed_of, skipped
from onnx import TensorProto, helper


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_what_is_no_padding_stays_the_same(tmp_path, mask, opset):
    s = encoder(opset=opset)
    model, result = skipped(s, tmp_path)
    assert (result.fired, result.refused, result.exact) == (PRODUCTS, [], True)
    feed = feed_of(mask)
    assert apart(run(s.model(), feed), run(model, feed), mask) < 2e-6


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.INT32, np.int32), (TensorProto.BOOL, np.bool_),
                                             (TensorProto.FLOAT, np.float32)])
def test_masks_of_any_type(tmp_path, kind, dtype):
    s = encoder(mask_type=kind)
    model, result = skipped(s, tmp_path)
    assert result.fired == PRODUCTS
    feed = feed_of(MASKS["right"], dtype)
    assert apart(run(s.model(), feed), run(model, feed), MASKS["right"]) < 2e-6


def test_linears_get_the_rows_that_count(tmp_path):
    s = encoder()
    model, _ = skipped(s, tmp_path)
    read = [node.input[0] for node in model.to_proto()[0].graph.node if node.op_type == "MatMul" and "weight" in node.input[1]]
    assert len(read) == PRODUCTS
    session = open_session(model, outputs=read)
    for mask in (MASKS["right"], MASKS["holes"], MASKS["none"]):
        found = session.run(feed_of(mask), read)
        first = 1 - mask[0][0]  # the first token is there even where it is padding, so that there is always one
        assert {found[name].shape[:2] for name in read} == {(1, int(np.sum(mask)) + first)}


def test_rows_of_padding_hold_another_token(tmp_path):
    model, _ = skipped(encoder(), tmp_path)
    found = run(model, feed_of(MASKS["right"]))["y"]
    assert np.array_equal(found[1, 3:], np.stack([found[1, 2]] * 2))


def test_half_precision(tmp_path):
    s = encoder(dtype=np.float16)
    model, result = skipped(s, tmp_path)
    assert result.fired == PRODUCTS
    feed = feed_of(MASKS["right"])
    assert apart(run(s.model(), feed), run(model, feed), MASKS["right"]) < 2e-2


@pytest.mark.parametrize("plan", [["quantize-ffn:also=attention,row_scale=true"], ["quantize-ffn:row_scale=true"],
                                  ["quantize-ffn:form=nbits"]])
def test_integers_whose_scale_is_of_one_row(tmp_path, plan):
    s = encoder()
    integers = Model.load(s.save(tmp_path / "float.onnx"))
    run_plan(integers, Plan.parse(plan), threads=1)
    model, result = skipped(s, tmp_path, [*plan, "skip-padding"])
    assert result.fired == PRODUCTS
    feed = feed_of(MASKS["right"])
    assert apart(run(integers, feed), run(model, feed), MASKS["right"]) < 1e-4


def test_padding_does_not_count_in_a_scale_over_all_rows(tmp_path):
    s = encoder()
    plan = ["quantize-ffn:row_scale=false,smooth=none"]
    model, result = skipped(s, tmp_path, [*plan, "skip-padding"])
    assert result.fired == PRODUCTS
    alone, padded = feed_of([[1, 1, 1]]), feed_of([[1, 1, 1, 0, 0]])
    padded["input_ids"][:, :3] = alone["input_ids"]
    ours, theirs = run(model, alone)["y"], run(model, padded)["y"][:, :3]
    assert np.abs(ours - theirs).max() < 1e-5


def test_one_value_is_packed_where_several_are_added_up(tmp_path):
    class Summed(Encoder):
        def embedded(self) -> str:
            words, kinds = (self.op("Gather", self.weight(self.numbers(WORDS, D, scale=1.0)), self.ids) for _ in range(2))
            return self.norm(self.op("Add", words, kinds), D)

    s = Summed()
    s.layers(1)
    s.give_rows()
    model, _ = skipped(s, tmp_path)
    gathers = ops(model).count("Gather") - ops(s.model()).count("Gather")
    assert gathers == 1 + 3 + 1 + 1  # the sum is packed; q, k and v unpacked; what attention mixed packed; the output unpacked
    assert apart(run(s.model(), feed_of(MASKS["right"])), run(model, feed_of(MASKS["right"])), MASKS["right"]) < 2e-6


def test_positions_that_are_added_stay_where_they_are(tmp_path):
    class Placed(Encoder):
        def embedded(self) -> str:
            words = self.op("Gather", self.weight(self.numbers(WORDS, D, scale=1.0)), self.ids)
            size = self.op("Slice", self.op("Shape", self.ids), *(self.weight(np.asarray([n], np.int64)) for n in (1, 2)))
            places = self.op("Slice", self.weight(self.numbers(16, D, scale=1.0)), self.weight(np.asarray([0], np.int64)), size)
            return self.norm(self.op("Add", words, places), D)

    s = Placed()
    s.layers(1)
    model, _ = skipped(s.give_rows(), tmp_path)
    assert apart(run(s.model(), feed_of(MASKS["left"])), run(model, feed_of(MASKS["left"])), MASKS["left"]) < 2e-6


def test_the_shape_of_a_value_is_still_that_of_all_tokens(tmp_path):
    s = Encoder()
    s.layers(1)
    s.op("Shape", s.last, out=s.output("shape", [3], TensorProto.INT64))
    s.linear(s.last, D, D)
    s.give_rows()
    model, _ = skipped(s, tmp_path)
    assert run(model, feed_of(MASKS["right"]))["shape"].tolist() == [3, 5, D]


def test_outputs_on_the_way_and_branches_get_all_rows(tmp_path):
    s = Encoder()
    s.layers(1)
    inner = helper.make_graph([helper.make_node("Neg", [s.last], ["negative"])], "then", [],
                              [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)])
    other = helper.make_graph([helper.make_node("Abs", [s.last], ["positive"])], "else", [],
                              [helper.make_tensor_value_info("positive", TensorProto.FLOAT, None)])
    s.op("If", s.weight(np.asarray(True)), out=s.output("branch", ROWS), then_branch=inner, else_branch=other)
    s.outputs.append(helper.make_tensor_value_info("stream_0", TensorProto.FLOAT, ROWS))
    s.last = s.ffn(s.last, D, 16)
    s.give_rows()
    model, result = skipped(s, tmp_path)
    assert result.fired == 8
    feed = feed_of(MASKS["holes"])
    before, after = run(s.model(), feed), run(model, feed)
    assert set(after) == {"branch", "stream_0", "y"}
    assert apart(before, after, MASKS["holes"]) < 2e-6


class Flattened(Encoder):
    """As some exporters write it: linears on [batch · tokens, d]."""

    def linear(self, x: str, d_in: int, d_out: int, *, bias: bool = True, name: str = "") -> str:
        flat = self.op("Reshape", x, self.weight(np.asarray([-1, d_in], np.int64)))
        y = self.op("Gemm", flat, self.weight(self.numbers(d_in, d_out)), self.weight(self.numbers(d_out, scale=0.3)))
        size = self.op("Concat", self.op("Shape", self.ids), self.weight(np.asarray([d_out], np.int64)), axis=0)
        return self.op("Reshape", y, size)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_linears_on_flattened_rows(tmp_path, mask):
    s = Flattened()
    s.layers()
    model, result = skipped(s.give_rows().give_mean(), tmp_path)
    assert result.fired == PRODUCTS
    plain = Encoder()
    plain.layers()
    (tmp_path / "plain").mkdir()
    same = skipped(plain.give_rows().give_mean(), tmp_path / "plain")[0]
    assert ops(model).count("Gather") == ops(same).count("Gather")  # what is flattened is not unpacked for that
    assert apart(run(s.model(), feed_of(mask)), run(model, feed_of(mask)), mask) < 2e-6


def test_a_flattened_output(tmp_path):
    s = Encoder()
    s.layers(1)
    flat = s.op("Reshape", s.last, s.weight(np.asarray([-1, D], np.int64)))
    s.op("Gemm", flat, s.weight(s.numbers(D, 5)), out=s.output("logits", [None, 5]))
    model, result = skipped(s, tmp_path)
    assert result.fired == 7
    before, after = (run(each, feed_of(MASKS["right"]))["logits"] for each in (s.model(), model))
    kept = np.asarray(MASKS["right"]).reshape(-1) != 0
    assert before.shape == after.shape
    assert np.abs(before[kept] - after[kept]).max() < 2e-6


def test_rows_of_tokens_first_are_in_another_order(tmp_path):
    class Turned(Encoder):
        def attention(self, x: str) -> str:
            turned = self.op("Transpose", super().attention(x), perm=[1, 0, 2])
            flat = self.op("Reshape", turned, self.weight(np.asarray([-1, D], np.int64)))
            made = self.op("Gemm", flat, self.weight(self.numbers(D, D)), self.weight(self.numbers(D)))
            return self.op("Transpose", self.op("Reshape", made, self.op("Shape", turned)), perm=[1, 0, 2])

    s = Turned()
    s.layers()
    model, result = skipped(s.give_rows(), tmp_path, fit=Feeds.of([feed_of([[1, 1, 1, 1, 0, 0]])]))
    assert result.fired == PRODUCTS  # all but those two
    for mask in MASKS.values():
        assert apart(run(s.model(), feed_of(mask)), run(model, feed_of(mask)), mask) < 2e-6


def test_an_empty_batch(tmp_path):
    s = Encoder()
    s.layers(1)
    model, _ = skipped(s.give_rows(), tmp_path)
    empty = feed_of(np.zeros((0, 4)))
    assert run(model, empty)["y"].shape == run(s.model(), empty)["y"].shape == (0, 4, D)


def test_the_proof_leaves_padding_out(tmp_path):
    skipped(encoder(), tmp_path)
    feeds = Feeds.of([feed_of(MASKS["right"])])
    found = equivalence(tmp_path / "model.onnx", tmp_path / "skipped.onnx", feeds, threads=1).differences
    assert found["given"] < 1e-5
    wrong = encoder()
    for name, each in wrong.initializers.items():
        if each.dims == [D, D]:
            wrong.weight(np.zeros((D, D), np.float32), name)
    wrong.save(tmp_path / "wrong.onnx")
    assert equivalence(tmp_path / "model.onnx", tmp_path / "wrong.onnx", feeds, threads=1).differences["given"] > 1e-3
