"""Feeds: where they come from, and what is said of those that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from ffnfold.graph.errors import InputError
from ffnfold.runtime import Feeds, InputSpec, load_feeds, parse_shape
from ffnfold.runtime.feeds import name_of
from onnx import TensorProto, helper, numpy_helper

IDS = InputSpec("ids", "tensor(int64)", ("batch", 4))
SCALE = InputSpec("scale", "tensor(float)", None)
BIAS = InputSpec("bias", "tensor(float)", (4,), optional=True)
INPUTS = (IDS, SCALE, BIAS)
GOOD = {"ids": np.ones((2, 4), np.int64), "scale": np.float32(3)}


def test_a_file_and_a_folder_are_sequences_in_order_of_name(tmp_path):
    for number in (2, 0, 1):
        np.savez(tmp_path / f"{number}.npz", ids=np.full((1, 4), number), scale=np.float32(0))
    feeds = load_feeds(tmp_path, INPUTS)
    assert [int(feed["ids"][0, 0]) for feed in feeds] == [0, 1, 2] == [int(feed["ids"][0, 0]) for feed in feeds]
    assert len(feeds) == 3
    assert not feeds.synthetic
    assert feeds.kind == "real"
    assert [int(feed["ids"][0, 0]) for feed in feeds[1:]] == [1, 2]
    assert len(load_feeds(tmp_path / "1.npz", INPUTS)) == 1


def test_feeds_are_read_when_they_are_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD)
    feeds = load_feeds(tmp_path, INPUTS)
    np.savez(tmp_path / "a.npz", ids=np.full((1, 4), 9), scale=np.float32(0))
    assert feeds[0]["ids"][0, 0] == 9


def test_numbers_may_be_in_another_byte_order(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.arange(4).reshape(1, 4).astype(">i8"), scale=np.asarray(3, ">f4"))
    feed = load_feeds(tmp_path, INPUTS)[0]
    assert (feed["ids"].tolist(), float(feed["scale"])) == ([[0, 1, 2, 3]], 3.0)
    assert feed["ids"].dtype.isnative
    assert feed["scale"].dtype.isnative


def test_a_feed_knows_its_file_or_its_number(tmp_path):
    np.savez(tmp_path / "a.npz", **GOOD)
    assert name_of(load_feeds(tmp_path, INPUTS)[0]) == str(tmp_path / "a.npz")
    assert [name_of(feed) for feed in Feeds.of([GOOD] * 3)[1:]] == ["feed 1", "feed 2"]
    assert name_of(GOOD) is None


def test_keys_may_say_in_and_then_out_is_ignored(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"in:{name}": value for name, value in GOOD.items()}, **{"out:y": np.ones(3)})
    assert set(load_feeds(tmp_path / "a.npz", INPUTS)[0]) == {"ids", "scale"}


def test_column_major_arrays_come_row_major(tmp_path):
    ids = np.asfortranarray(np.arange(8).reshape(2, 4))
    np.savez(tmp_path / "a.npz", ids=ids, scale=np.float32(0))
    feed = load_feeds(tmp_path, INPUTS)[0]
    assert feed["ids"].flags.c_contiguous
    assert feed["scale"].shape == ()
    np.testing.assert_array_equal(feed["ids"], ids)


@pytest.mark.parametrize(("change", "words"), [
    ({"ids": None}, ["ids", "missing", "int64", "[batch, 4]"]),
    ({"more": np.ones(1)}, ["more", "ids, scale, bias"]),
    ({"ids": np.ones((2, 4), np.int32)}, ["ids", "int64", "int32"]),
    ({"ids": np.ones((2, 5), np.int64)}, ["ids", "[batch, 4]", "[2, 5]"]),
    ({"ids": np.ones(4, np.int64)}, ["ids", "[batch, 4]", "[4]"]),
    ({"bias": np.ones(3, np.float32)}, ["bias", "[4]", "[3]"]),
    ({"ids": np.array([None])}, ["ids", "pickled"]),
])
def test_a_feed_that_does_not_fit_is_said_in_one_line(tmp_path, one_line, change, words):
    np.savez(tmp_path / "a.npz", **{name: value for name, value in {**GOOD, **change}.items() if value is not None})
    with pytest.raises(InputError) as caught:
        load_feeds(tmp_path, INPUTS)
    one_line(caught.value, "a.npz", *words)


def test_what_is_no_feed_is_said_in_one_line(tmp_path, one_line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no feed")
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "whole.npz", **GOOD)
    (tmp_path / "short.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    for name in ("none", "empty", "text.npz", "array.npy", "short.npz"):
        with pytest.raises(InputError) as caught:
            load_feeds(tmp_path / name, INPUTS)
        one_line(caught.value, name)


def save_set(folder, *tensors):
    folder.mkdir(parents=True)
    for number, tensor in enumerate(tensors):
        (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())


def test_onnx_test_data_goes_by_name_and_else_by_position(tmp_path):
    ids, scale = GOOD["ids"], np.asarray(GOOD["scale"])
    save_set(tmp_path / "test_data_set_0", numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(ids, "ids"))
    save_set(tmp_path / "test_data_set_1", numpy_helper.from_array(ids + 1, ""), numpy_helper.from_array(scale, "other"))
    save_set(tmp_path / "test_data_set_10", numpy_helper.from_array(ids + 10), numpy_helper.from_array(scale))
    assert [int(feed["ids"][0, 0]) for feed in load_feeds(tmp_path, INPUTS)] == [1, 2, 11]
    assert len(load_feeds(tmp_path / "test_data_set_1", INPUTS)) == 1


def test_onnx_test_data_holds_sequences_and_optionals(tmp_path):
    pieces = [np.ones(2, np.float32), np.zeros(3, np.float32)]
    specs = (InputSpec("pieces", "seq(tensor(float))", None), InputSpec("maybe", "optional(tensor(float))", None, optional=True))
    maybe = numpy_helper.from_optional(np.ones(2, np.float32), "maybe")
    save_set(tmp_path / "test_data_set_0", numpy_helper.from_list(pieces, "pieces"), maybe)
    feed = load_feeds(tmp_path, specs)[0]
    assert [len(piece) for piece in feed["pieces"]] == [2, 3]
    assert len(feed["maybe"]) == 2


def test_onnx_test_data_that_does_not_fit_is_said_in_one_line(tmp_path, one_line):
    ids = numpy_helper.from_array(GOOD["ids"], "ids")
    save_set(tmp_path / "type" / "test_data_set_0", numpy_helper.from_array(np.ones((2, 4)), "ids"))
    save_set(tmp_path / "missing" / "test_data_set_0", ids)
    save_set(tmp_path / "twice" / "test_data_set_0", ids, ids)
    save_set(tmp_path / "many" / "test_data_set_0", *([helper.make_tensor("", TensorProto.FLOAT, [], [1.0])] * 4))
    save_set(tmp_path / "broken" / "test_data_set_0", ids)
    (tmp_path / "broken" / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    for name, word in (("type", "int64"), ("missing", "scale"), ("twice", "twice"), ("many", "input"), ("broken", "input_0.pb")):
        with pytest.raises(InputError) as caught:
            load_feeds(tmp_path / name, INPUTS)
        one_line(caught.value, name, word)


def test_feeds_in_memory_may_say_that_they_are_made_up():
    feeds = Feeds.of([GOOD, GOOD], synthetic=True)
    assert feeds.kind == "synthetic"
    assert feeds[:1].synthetic
    assert len(list(feeds)) == 2


def test_shapes_are_written_with_an_x(one_line):
    assert parse_shape("ids=1x128") == ("ids", (1, 128))
    assert parse_shape("a=b=7") == ("a=b", (7,))
    assert parse_shape("scalar=") == ("scalar", ())
    for text in ("ids", "=1x2", "ids=1,2", "ids=1x", "ids=-1"):
        with pytest.raises(InputError) as caught:
            parse_shape(text)
        one_line(caught.value, text, "NAME=1x128")


def test_each_beginning_of_mixed_feeds_is_spread_over_all_of_them():
    feeds = Feeds.of([{"n": number} for number in range(64)], synthetic=True)
    order = [feed["n"] for feed in feeds.mixed()]
    assert sorted(order) == list(range(64))
    assert feeds.mixed().synthetic
    for count in (4, 8, 16):
        places = sorted(order[:count])
        assert max(b - a for a, b in zip([-1, *places], [*places, 64], strict=True)) <= 3 * 64 / count
