"""Values inside a model, as rows, without their padding."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.runtime import Feeds, capture
from ffnfold.runtime.capture import capture_raw
from ffnfold.runtime.padding import Padding, rows_of
from onnx import TensorProto, helper

MASK = np.array([[1, 1, 0], [0, 1, 1]])


@pytest.fixture
def masked(workshop, random):
    """x ``[2, 3, 4]`` → hidden = x W ``[2, 3, 5]``, flat ``[6, 5]``, heads ``[2, 7, 3, 5]``, pooled ``[2, 5]``; a mask beside."""
    weight = random.standard_normal((4, 5), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["hidden"]), helper.make_node("Reshape", ["hidden", "two"], ["flat"]),
             helper.make_node("Unsqueeze", ["hidden", "axis"], ["apart"]),
             helper.make_node("Expand", ["apart", "wide"], ["heads"]),
             helper.make_node("Transpose", ["hidden"], ["tokens_first"], perm=[1, 0, 2]),
             helper.make_node("ReduceMax", ["hidden", "axis"], ["pooled"], keepdims=0),
             helper.make_node("Transpose", ["hidden"], ["across"], perm=[0, 2, 1]),
             helper.make_node("Cast", ["attention_mask"], ["whole"], to=TensorProto.INT32),
             helper.make_node("Identity", ["pooled"], ["y"])]
    path = workshop.save(nodes, {"x": (TensorProto.FLOAT, ["b", "t", 4]), "attention_mask": (TensorProto.INT64, ["b", "t"])},
                         {"y": (TensorProto.FLOAT, None)},
                         {"w": weight, "two": np.array([-1, 5]), "axis": np.array([1]), "wide": np.array([1, 7, 1, 1])})
    x = random.standard_normal((2, 3, 4), np.float32)
    return path, Feeds.of([{"x": x, "attention_mask": MASK}, {"x": x, "attention_mask": np.ones_like(MASK)}]), x @ weight


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_that_are_padding_are_left_out(masked, in_memory):
    path, feeds, hidden = masked
    first, second = capture(Model.load(path) if in_memory else path, feeds, ["hidden", "flat", "heads", "pooled"])
    for name in ("hidden", "flat"):
        np.testing.assert_allclose(first[name], hidden[MASK == 1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(second[name], hidden.reshape(6, 5), rtol=1e-4, atol=1e-5)
    heads = np.broadcast_to(hidden[:, None], (2, 7, 3, 5))
    kept = np.broadcast_to(MASK[:, None] == 1, (2, 7, 3))
    np.testing.assert_allclose(first["heads"], heads[kept], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first["pooled"], hidden.max(axis=1), rtol=1e-4, atol=1e-5)


def test_tokens_may_come_before_the_batch(masked):
    path, feeds, hidden = masked
    first = next(capture(path, feeds, ["tokens_first"]))["tokens_first"]
    np.testing.assert_allclose(first, hidden.transpose(1, 0, 2)[MASK.T == 1], rtol=1e-4, atol=1e-5)
    assert Padding({"attention_mask": MASK}).kept((3, 2, 4, 5)).sum() == 4 * MASK.sum()


def test_batch_is_taken_to_come_first_where_it_has_as_many_as_there_are_tokens():
    square = np.array([[1, 0], [1, 1]])
    np.testing.assert_array_equal(Padding({"attention_mask": square}).kept((2, 2, 4)), [True, False, True, True])


def test_the_features_may_lie_on_another_axis(masked):
    path, feeds, _ = masked
    first = next(capture(path, feeds, ["hidden", "across"], axes={"across": -2}))
    np.testing.assert_array_equal(first["hidden"], first["across"])


def test_rows_are_float32_or_float64(masked):
    path, feeds, _ = masked
    first = next(capture(path, feeds, ["hidden", "whole"]))
    assert (first["hidden"].dtype, first["whole"].dtype) == (np.float32, np.float64)


def test_raw_values_keep_shape_and_type(masked):
    path, feeds, hidden = masked
    first = next(capture_raw(path, feeds, ["hidden", "whole"]))
    np.testing.assert_allclose(first["hidden"], hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(first["whole"], MASK.astype(np.int32), strict=True)


def test_a_value_that_is_not_there_is_named(masked):
    path, feeds, _ = masked
    with pytest.raises(InputError, match="nowhere"):
        next(capture(path, feeds, ["nowhere"]))


def test_where_a_past_is_fed_the_end_of_the_mask_counts():
    padding = Padding({"attention_mask": np.array([[0, 0, 1, 1, 0]]), "input_ids": np.zeros((1, 2), np.int64)})
    np.testing.assert_array_equal(rows_of(np.arange(4.0).reshape(1, 2, 2), padding), [[0, 1]])
    assert rows_of(np.zeros((1, 5, 2)), padding).shape == (2, 2)


def test_embeddings_with_tokens_first_are_no_sign_of_a_past():
    feed = {"attention_mask": np.array([[1, 1, 1, 0]] * 2), "inputs_embeds": np.zeros((4, 2, 8), np.float32)}
    assert len(Padding(feed).masks) == 1


def test_a_scalar_or_a_vector_is_one_row():
    assert rows_of(np.float32(3), None).shape == (1, 1)
    assert rows_of(np.zeros(4), Padding({})).shape == (1, 4)
    assert rows_of(np.zeros((2, 0, 4)), None).shape == (0, 4)
