"""Reading models: weights stay in their files; what is damaged, missing or not allowed is one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.graph.store import read_model
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.random.default_rng(3).standard_normal((24, 20)).astype(np.float32)
FEED = {"x": np.random.default_rng(4).standard_normal((3, 24)).astype(np.float32)}
EXPECTED = FEED["x"] @ WEIGHTS


def pointing_to(path: Path, shape=WEIGHTS.shape, onnx_type: int = TensorProto.FLOAT, **entries: str) -> Path:
    """A model x → x W at ``path`` whose W has the external data entries given."""
    tensor = TensorProto(name="w", dims=shape, data_type=onnx_type, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    s = Sketch()
    s.op("MatMul", s.input("x", [None, 24]), s.weight(tensor, "w"), out=s.output("y", [None, 20]))
    path.write_bytes(s.model().SerializeToString())
    return path


def weight(path: Path) -> np.ndarray:
    (values,) = read_model(path).values.values()
    return values.load()


def refused(path: Path, *words: str) -> None:
    """Reading ``path`` is an error of one line that names the file and says ``words``."""
    with pytest.raises(InputError) as raised:
        Model.load(path)
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(str(path))
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("one_file", [True, False], ids=["one file", "a file for each tensor"])
def test_external_data_is_read_where_it_lies(tmp_path, one_file):
    s = transformer(2)
    inline = s.model()
    s.save(tmp_path / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=one_file, size_threshold=0,
           location="m.data" if one_file else None)
    stored = read_model(tmp_path / "m.onnx")
    assert stored.external
    assert stored.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir()) - _padding(tmp_path, stored)
    found = {tensor.name: values_of(stored, tensor).load() for tensor in stored.proto.graph.initializer}
    for tensor in inline.graph.initializer:
        np.testing.assert_array_equal(found[tensor.name], numpy_helper.to_array(tensor))
    feed = {"x": s.numbers(2, 3, 8, scale=1)}
    np.testing.assert_allclose(run(Model.load(tmp_path / "m.onnx"), feed)["y"], run(inline, feed)["y"], rtol=1e-5, atol=1e-6)


def values_of(stored, tensor):
    return stored.values[next(entry.value for entry in tensor.external_data if entry.key == "ffnfold:weight")]


def _padding(folder: Path, stored) -> int:
    data = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".onnx")
    return data - sum(values.nbytes for values in stored.values.values())


@pytest.mark.parametrize("entries", [
    {}, {"offset": "0"}, {"length": str(WEIGHTS.nbytes)}, {"offset": "0", "length": str(WEIGHTS.nbytes)},
    {"offset": "0", "length": str(WEIGHTS.nbytes), "checksum": "abc"}])
def test_offset_and_length_may_be_missing(tmp_path, entries):
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    path = pointing_to(tmp_path / "m.onnx", location="w.bin", **entries)
    np.testing.assert_array_equal(weight(path), WEIGHTS)


def test_without_a_length_the_dimensions_say_how_long_it_is(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(4096) + WEIGHTS.tobytes() + bytes(100))
    path = pointing_to(tmp_path / "m.onnx", location="w.bin", offset="4096")
    np.testing.assert_allclose(run(path, FEED)["y"], EXPECTED, rtol=1e-5, atol=1e-5)  # as ONNX Runtime reads it
    np.testing.assert_array_equal(weight(path), WEIGHTS)


@pytest.mark.parametrize("offset", [1, 2, 3, 13, 4097])
def test_weights_may_begin_at_any_byte(tmp_path, offset):
    (tmp_path / "w.bin").write_bytes(bytes(offset) + WEIGHTS.tobytes() + b"behind")
    path = pointing_to(tmp_path / "m.onnx", location="w.bin", offset=str(offset), length=str(WEIGHTS.nbytes))
    (values,) = read_model(path).values.values()
    np.testing.assert_array_equal(values.load(), WEIGHTS)
    np.testing.assert_array_equal(values.memmap(), WEIGHTS)
    assert b"".join(values.tiles(100)) == WEIGHTS.tobytes()
    np.testing.assert_allclose(run(Model.load(path), FEED)["y"], EXPECTED, rtol=1e-5, atol=1e-5)


def test_a_data_file_may_lie_in_a_folder_below(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(WEIGHTS.tobytes())
    np.testing.assert_array_equal(weight(pointing_to(tmp_path / "m.onnx", location="weights/w.bin")), WEIGHTS)
    np.testing.assert_array_equal(weight(pointing_to(tmp_path / "m.onnx", location="./weights/w.bin")), WEIGHTS)


def test_data_that_two_tensors_share_is_one_weight(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    path = pointing_to(tmp_path / "m.onnx", location="w.bin")
    model = onnx.load(path, load_external_data=False)
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[0])
    twin.name = "twin"
    path.write_bytes(model.SerializeToString())
    stored = read_model(path)
    assert len(stored.values) == 1
    assert stored.nbytes == path.stat().st_size + WEIGHTS.nbytes


@pytest.mark.parametrize(("location", "words"), [
    ("/etc/passwd", "not a path relative"), ("{folder}/w.bin", "not a path relative"), ("C:\\w.bin", "not a path relative"),
    ("\\\\host\\w.bin", "not a path relative"), ("../w.bin", "leaves the folder"), ("sub/../../w.bin", "leaves the folder"),
    ("..\\w.bin", "leaves the folder"), ("", "not a path relative"), ("w\0.bin", "not a path relative"),
    ("nothing.bin", "missing"), ("sub", "folder"), ("w" * 5000, "missing"), ("sub/../w.bin", "leaves the folder")])
def test_places_where_external_data_may_not_be(tmp_path, location, words):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder):
        (place / "w.bin").write_bytes(WEIGHTS.tobytes())
    path = pointing_to(folder / "m.onnx", location=location.format(folder=folder))
    with pytest.raises(InputError, match=words) as raised:
        Model.load(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHTS.tobytes())
    (folder / "w.bin").symlink_to(tmp_path / "secret")
    refused(pointing_to(folder / "m.onnx", location="w.bin"), "w.bin", "link out of the folder")


def test_a_link_within_the_folder_is_followed(tmp_path):
    (tmp_path / "real.bin").write_bytes(WEIGHTS.tobytes())
    (tmp_path / "w.bin").symlink_to("real.bin")
    np.testing.assert_array_equal(weight(pointing_to(tmp_path / "m.onnx", location="w.bin")), WEIGHTS)


def test_a_cache_of_links_is_read(tmp_path):
    """As Hugging Face caches are: a snapshot of links into a folder of blobs, model and data both."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "2222").write_bytes(WEIGHTS.tobytes())
    pointing_to(blobs / "1111", location="model.onnx_data")
    (snapshot / "model.onnx").symlink_to("../../../blobs/1111")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/2222")
    np.testing.assert_array_equal(weight(snapshot / "model.onnx"), WEIGHTS)
    np.testing.assert_allclose(run(Model.load(snapshot / "model.onnx"), FEED)["y"], EXPECTED, rtol=1e-5, atol=1e-5)


def test_a_relative_path_is_relative_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    pointing_to(tmp_path / "m.onnx", location="w.bin")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(weight(Path("m.onnx")), WEIGHTS)


@pytest.mark.parametrize(("shape", "entries", "words"), [
    ((24, 20), {"length": "1920", "offset": "1"}, "truncated"),
    ((24, 20), {"offset": "4000"}, "truncated"),
    ((24, 21), {}, "truncated"),
    ((24, 20), {"length": "1916"}, "1916"),
    ((24, 19), {"length": "1920"}, "1824"),
    ((1 << 62,), {}, "truncated"),
    ((1 << 62,), {"length": str((1 << 62) * 4)}, "length"),
    ((1 << 31, 1 << 31), {"length": "1920"}, "should take"),
    ((-24, -20), {}, "shape"),
    ((24, 20), {"offset": "-1"}, "offset or length"),
    ((24, 20), {"offset": "1e3"}, "offset or length"),
    ((24, 20), {"length": "9" * 30}, "offset or length")])
def test_dimensions_and_bytes_must_agree(tmp_path, shape, entries, words):
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    refused(pointing_to(tmp_path / "m.onnx", shape, location="w.bin", **entries), "'w'", words)


def test_external_data_without_a_place_is_refused(tmp_path):
    refused(pointing_to(tmp_path / "m.onnx"), "'w'", "names no file")


@pytest.mark.parametrize("onnx_type", [TensorProto.STRING, TensorProto.UNDEFINED, 999])
def test_element_types_that_have_no_bytes_cannot_lie_outside(tmp_path, onnx_type):
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    refused(pointing_to(tmp_path / "m.onnx", onnx_type=onnx_type, location="w.bin"), "element type")


@pytest.mark.parametrize(("tensor", "words"), [
    (TensorProto(name="w", dims=[3], data_type=TensorProto.FLOAT, raw_data=bytes(8)), "should hold 12"),
    (TensorProto(name="w", dims=[600], data_type=TensorProto.FLOAT, raw_data=bytes(2396)), "should take 2400"),
    (TensorProto(name="w", dims=[1 << 62], data_type=TensorProto.FLOAT, raw_data=bytes(2400)), "should take"),
    (TensorProto(name="w", dims=[1 << 62], data_type=TensorProto.FLOAT, raw_data=bytes(8)), "should hold"),
    (TensorProto(name="w", dims=[-1], data_type=TensorProto.FLOAT, raw_data=bytes(4)), "negative"),
    (TensorProto(name="w", dims=[-600], data_type=TensorProto.FLOAT, raw_data=bytes(2400)), "shape"),
    (TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT, float_data=[1.0]), "should hold 2"),
    (TensorProto(name="w", dims=[3], data_type=TensorProto.INT4, raw_data=bytes(3)), "should hold 2"),
    (TensorProto(name="w", dims=[600], data_type=TensorProto.INT64, float_data=[1.0] * 600), "wrong field"),
    (TensorProto(name="w", dims=[1], data_type=TensorProto.STRING), "should hold 1"),
    (TensorProto(name="w", dims=[1], data_type=77, raw_data=b"a"), "unknown element type")])
def test_numbers_inside_must_be_as_many_as_the_dimensions_say(tmp_path, tensor, words):
    s = Sketch()
    s.op("Identity", s.weight(tensor, "w"), out=s.output("y"))
    refused(s.save(tmp_path / "m.onnx"), "'w'", words)


@pytest.mark.parametrize("content", [b"hello, this is a text\n", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(30),
                                     b"\x80\x04\x95" + bytes(50), bytes(10), b"{\"model\": 1}", b"\x08\x07"])
def test_what_is_no_model_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, "not an ONNX model")


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"")
    refused(tmp_path / "m.onnx", "empty")


def test_a_missing_file_a_folder_and_a_device_are_no_models(tmp_path):
    refused(tmp_path / "m.onnx", "no such file")
    refused(tmp_path, "folder")
    refused(Path(os.devnull), "no regular file")
    refused(tmp_path / "m\0.onnx", "cannot be read")


def test_a_tensor_alone_is_no_model(tmp_path):
    path = tmp_path / "w.pb"
    path.write_bytes(numpy_helper.from_array(WEIGHTS, "w").SerializeToString())
    refused(path, "not an ONNX model")


@pytest.mark.parametrize(("nodes", "words"), [
    ([helper.make_node("MatMul", ["x"], ["y"], name="mm")], ("'mm'", "needs at least 2")),
    ([helper.make_node("Cast", ["x"], ["y"], name="c")], ("'c'", "'to'")),
    ([helper.make_node("Softmax", ["x"], ["y"], name="s", axis=1.5)], ("'s'", "'axis'", "INT")),
    ([helper.make_node("MatMulNBits", ["x", "w", "w"], ["y"], domain="com.microsoft", N=2)], ("MatMulNBits", "'K'")),
    ([helper.make_node("Relu", ["nobody"], ["y"], name="r")], ("'r'", "'nobody'", "nothing defines")),
    ([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Relu", ["x"], ["y"])], ("'y'", "defined twice")),
    ([helper.make_node("Relu", ["x"], ["w"]), helper.make_node("Relu", ["x"], ["y"])], ("'w'", "defined twice")),
    ([helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["y"])],
     ("cycle",)),
    ([helper.make_node("Relu", ["x"], ["z"])], ("'y'", "computed by no node"))])
def test_graphs_that_cannot_run_are_refused_with_the_node(tmp_path, nodes, words):
    s = Sketch()
    s.input("x", [2, 2])
    s.weight(np.ones((2, 2), np.float32), "w")
    s.output("y")
    s.nodes = nodes
    refused(s.save(tmp_path / "m.onnx"), *words)


def test_nodes_in_any_order_are_read(tmp_path):
    s = transformer(1)
    s.nodes.reverse()
    assert len(Model.load(s.save(tmp_path / "m.onnx")).graph.nodes) == len(s.nodes)


def test_a_file_that_shrinks_while_it_is_in_use_is_said_to_have(tmp_path):
    (tmp_path / "w.bin").write_bytes(WEIGHTS.tobytes())
    (values,) = read_model(pointing_to(tmp_path / "m.onnx", location="w.bin")).values.values()
    os.truncate(tmp_path / "w.bin", 100)
    with pytest.raises(InputError, match="while it is in use"):
        values.load()


def test_a_model_with_more_data_files_than_stay_open_is_read(tmp_path):
    s = Sketch()
    x = s.input("x", [4])
    for number in range(100):
        tensor = TensorProto(name=f"w{number}", dims=[4], data_type=1, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"w{number}.bin")
        (tmp_path / f"w{number}.bin").write_bytes(np.full(4, number, np.float32).tobytes())
        x = s.op("Add", x, s.weight(tensor, f"w{number}"))
    s.op("Identity", x, out=s.output("y", [4]))
    model = Model.load(s.save(tmp_path / "m.onnx"))
    np.testing.assert_array_equal(run(model, {"x": np.zeros(4, np.float32)})["y"], np.full(4, 4950))
