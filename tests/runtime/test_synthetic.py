"""Feeds made up from the input specification."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.runtime import InputSpec, open_session, synthetic_feeds
from onnx import TensorProto, helper


def spec(name, kind="int64", *shape, optional=False):
    return InputSpec(name, f"tensor({kind})", shape, optional)


def only(*inputs, **settings):
    return synthetic_feeds(inputs, **settings)[0]


def test_names_say_what_to_put_in():
    feed = only(spec("input_ids", "int64", "b", "s"), spec("attention_mask", "int64", "b", "s"),
                spec("token_type_ids", "int64", "b", "s"), spec("position_ids", "int64", "b", "s"),
                spec("use_cache_branch", "bool", 1), spec("pixel_mask", "bool", "b", "s"), spec("x", "float16", 2, 3))
    assert {value.shape for name, value in feed.items() if name.endswith("ids")} == {(1, 128)}
    assert feed["input_ids"].min() >= 0
    assert feed["input_ids"].max() < 100
    assert feed["input_ids"].std() > 0
    assert (feed["attention_mask"] == 1).all()
    assert not feed["token_type_ids"].any()
    np.testing.assert_array_equal(feed["position_ids"], [np.arange(128)])
    assert not feed["use_cache_branch"].any()
    assert feed["pixel_mask"].all()
    assert feed["x"].dtype == np.float16
    assert feed["x"].shape == (2, 3)


def test_open_dimensions_by_what_they_belong_to():
    feed = only(spec("pixel_values", "float", "n", None, None, None), spec("channels_last", "float", None, "h", "w", 3),
                spec("input_values", "float", "batch", "samples"),
                spec("past_key_values.0.key", "float", "batch", 4, "past_len", 8),
                spec("attention_mask", "int64", "batch", "past_len + tokens"), spec("input_ids", "int64", "batch", "tokens"))
    assert {name: value.shape for name, value in feed.items()} == {
        "pixel_values": (1, 3, 224, 224), "channels_last": (1, 224, 224, 3), "input_values": (1, 16000),
        "past_key_values.0.key": (1, 4, 0, 8), "attention_mask": (1, 128), "input_ids": (1, 128)}


def test_a_shape_that_is_given_holds_wherever_its_names_return():
    feed = only(spec("input_ids", "int64", "b", "s"), spec("attention_mask", "int64", "other", "s"),
                spec("states", "float", "b", "s", 8), shapes={"input_ids": (4, 16)})
    assert [value.shape for value in feed.values()] == [(4, 16), (4, 16), (4, 16, 8)]


def test_the_same_seed_gives_the_same_feeds():
    inputs = [spec("x", "float", 4)]
    first, second, other = (synthetic_feeds(inputs, count=2, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[1]["x"], second[1]["x"])
    assert not np.array_equal(first[0]["x"], first[1]["x"])
    assert not np.array_equal(first[0]["x"], other[0]["x"])
    assert first.synthetic
    assert len(first) == 2


def test_optional_inputs_are_left_out():
    assert set(only(spec("x", "float", 4), spec("y", "float", 4, optional=True))) == {"x"}


def test_token_ids_stay_inside_the_embedding_and_its_positions(workshop):
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
             helper.make_node("Shape", ["input_ids"], ["length"], start=1),
             helper.make_node("Squeeze", ["length"], ["stop"]),
             helper.make_node("Range", ["zero", "stop", "one"], ["places"]),
             helper.make_node("Gather", ["positions", "places"], ["placed"]),
             helper.make_node("Add", ["embedded", "placed"], ["y"])]
    path = workshop.save(nodes, {"input_ids": (TensorProto.INT64, ["b", "s"])}, {"y": (TensorProto.FLOAT, None)}, {
        "table": np.ones((5, 8), np.float32), "positions": np.ones((40, 8), np.float32),
        "zero": np.int64(0), "one": np.int64(1)})
    feeds = synthetic_feeds(Model.load(path), count=3)
    assert max(int(feed["input_ids"].max()) for feed in feeds) < 5
    assert open_session(path).run(feeds[0])["y"].shape == (1, 32, 8)


def test_what_cannot_be_made_up_is_said_in_one_line(one_line):
    ids = spec("ids", "int64", "b", 4)
    for inputs, shapes, words in (([ids], {"x": (1,)}, ["x", "ids"]), ([ids], {"ids": (1, 5)}, ["ids", "[b, 4]", "[1, 5]"]),
                                  ([ids], {"ids": (4,)}, ["[b, 4]"]), ([spec("words", "string", 1)], {}, ["words", "string"]),
                                  ([InputSpec("list", "seq(tensor(float))", None)], {}, ["list", "seq"])):
        with pytest.raises(InputError) as caught:
            synthetic_feeds(inputs, shapes)
        one_line(caught.value, *words)
