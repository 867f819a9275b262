"""Writing models: the same numbers, the old file or the new one whole, nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from ffn_graphs import Sketch, run, transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model
from ffnfold.graph.save import write_model
from ffnfold.graph.store import read_model
from ffnfold.graph.tensors import tensors
from ffnfold.graph.types import numpy_type
from ffnfold.graph.weights import ComputedValues, StoredValues, tensor_proto
from onnx import TensorProto, helper, numpy_helper

KINDS = [TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN,
         TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ, TensorProto.INT4, TensorProto.UINT4,
         TensorProto.FLOAT4E2M1, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32,
         TensorProto.UINT32, TensorProto.INT64, TensorProto.UINT64, TensorProto.BOOL, TensorProto.COMPLEX64,
         TensorProto.COMPLEX128]
ODD = 20_001  # elements: the last byte of a 4-bit tensor is half empty


def raw(kind: int, count: int = ODD) -> TensorProto:
    """A tensor of any type with every bit pattern in it."""
    bits = 4 if kind in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1) else numpy_type(kind).itemsize * 8
    data = bytearray(np.random.default_rng(kind).integers(0, 256, (count * bits + 7) // 8, np.uint8).tobytes())
    if bits == 4 and count % 2:
        data[-1] &= 15
    if kind == TensorProto.BOOL:
        data = bytearray(byte & 1 for byte in data)
    return TensorProto(name=f"w{kind}_{count}", dims=[count], data_type=kind, raw_data=bytes(data))


def holding(*tensors: TensorProto) -> onnx.ModelProto:
    """A model whose initializers are ``tensors``."""
    graph = helper.make_graph([helper.make_node("Identity", [tensors[0].name], ["y"])], "g", [],
                              [helper.make_tensor_value_info("y", tensors[0].data_type, None)], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def saved(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def loaded(path: Path) -> onnx.ModelProto:
    """The model with its weights inside, as the onnx package reads it."""
    proto = onnx.load(path)
    for tensor, _ in tensors(proto):
        tensor.ClearField("data_location")  # what onnx.load leaves of external data
    return proto


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS, ids=[TensorProto.DataType.Name(kind) for kind in KINDS])
@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_every_element_type_is_kept_bit_for_bit(tmp_path, kind, external):
    proto = holding(raw(kind), raw(TensorProto.FLOAT, 7))
    Model.load(saved(proto, tmp_path / "a.onnx")).save(tmp_path / "b.onnx", external=external)
    assert loaded(tmp_path / "b.onnx") == proto
    assert len(list(tmp_path.glob("b.onnx.*.data"))) == external


@pytest.mark.parametrize("kind", [TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT16])
def test_a_weight_that_is_loaded_and_computed_again_keeps_its_bits(tmp_path, kind):
    stored = read_model(saved(holding(raw(kind)), tmp_path / "a.onnx"))
    ((key, values),) = stored.values.items()
    again = ComputedValues(values.shape, values.onnx_type, values.load)
    write_model(stored.proto, {key: again}, tmp_path / "b.onnx")
    assert onnx.load(tmp_path / "b.onnx").graph.initializer[0].raw_data == raw(kind).raw_data


@pytest.mark.parametrize("field", ["float_data", "double_data", "int32_data", "int64_data"])
def test_numbers_in_lists_are_kept(tmp_path, field):
    kind = {"float_data": TensorProto.FLOAT, "double_data": TensorProto.DOUBLE, "int32_data": TensorProto.BFLOAT16,
            "int64_data": TensorProto.INT64}[field]
    numbers = np.arange(3000) if kind == TensorProto.INT64 else np.linspace(-1, 1, 3000)
    proto = holding(helper.make_tensor("w", kind, [3000], numbers.astype(numpy_type(kind))))
    assert len(getattr(proto.graph.initializer[0], field)) == 3000
    Model.load(saved(proto, tmp_path / "a.onnx")).save(tmp_path / "b.onnx")
    assert loaded(tmp_path / "b.onnx") == proto
    Model.load(tmp_path / "a.onnx").save(tmp_path / "c.onnx", external=True)
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(tmp_path / "c.onnx").graph.initializer[0]),
                                  numpy_helper.to_array(proto.graph.initializer[0]))


def test_a_model_goes_from_inside_to_external_and_back(tmp_path):
    proto = transformer(2, 32, 128).model()
    Model.load(saved(proto, tmp_path / "a.onnx")).save(tmp_path / "b.onnx", external=True)
    assert (tmp_path / "b.onnx").stat().st_size < 8000
    Model.load(tmp_path / "b.onnx").save(tmp_path / "c.onnx")  # as it was: external
    assert len(list(tmp_path.glob("c.onnx.*.data"))) == 1
    Model.load(tmp_path / "c.onnx").save(tmp_path / "d.onnx", external=False)
    assert loaded(tmp_path / "d.onnx") == proto
    feed = {"x": np.ones((1, 3, 32), np.float32)}
    np.testing.assert_array_equal(run(tmp_path / "c.onnx", feed)["y"], run(proto, feed)["y"])


def test_weights_in_bodies_and_constants_go_outside_too(tmp_path):
    body = helper.make_graph([helper.make_node("Constant", [], ["k"], value=raw(TensorProto.FLOAT, 5000)),
                              helper.make_node("Add", ["k", "inner"], ["out"])], "body", [],
                             [helper.make_tensor_value_info("out", TensorProto.FLOAT, [5000])],
                             [numpy_helper.from_array(np.ones(5000, np.float32), "inner")])
    s = Sketch()
    s.op("If", s.input("c", [], TensorProto.BOOL), out="z", then_branch=body, else_branch=body)
    s.op("Identity", "z", out=s.output("y", [5000]))
    before = run(s.model(), {"c": np.asarray(True)})["y"]
    Model.load(s.save(tmp_path / "a.onnx")).save(tmp_path / "b.onnx", external=True)
    assert loaded(tmp_path / "b.onnx") == s.model()
    np.testing.assert_array_equal(run(tmp_path / "b.onnx", {"c": np.asarray(True)})["y"], before)


def test_above_the_limit_weights_go_outside_unasked(tmp_path):
    proto = holding(raw(TensorProto.FLOAT), raw(TensorProto.INT8))
    stored = read_model(saved(proto, tmp_path / "a.onnx"))
    size = (tmp_path / "a.onnx").stat().st_size
    write_model(stored.proto, stored.values, tmp_path / "fits.onnx", limit=size)
    write_model(stored.proto, stored.values, tmp_path / "larger.onnx", limit=size - 1)
    assert (tmp_path / "fits.onnx").stat().st_size == size
    assert (tmp_path / "larger.onnx").stat().st_size < 1000
    assert loaded(tmp_path / "larger.onnx") == proto


def test_constants_go_outside_only_where_the_limit_asks_for_it(tmp_path):
    node = helper.make_node("Constant", [], ["k"], value=raw(TensorProto.FLOAT, 5000))
    s = Sketch()
    s.nodes.append(node)
    s.op("Add", "k", s.weight(np.ones(5000, np.float32)), out=s.output("y", [5000]))
    stored = read_model(s.save(tmp_path / "a.onnx"))
    write_model(stored.proto, stored.values, tmp_path / "b.onnx", external=True)
    assert (tmp_path / "b.onnx").stat().st_size > 20_000
    write_model(stored.proto, stored.values, tmp_path / "c.onnx", external=True, limit=10_000)
    assert (tmp_path / "c.onnx").stat().st_size < 1000
    for name in ("b.onnx", "c.onnx"):
        assert loaded(tmp_path / name) == s.model()


def test_what_is_shared_is_stored_once(tmp_path):
    proto = holding(raw(TensorProto.FLOAT))
    onnx.save_model(proto, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    proto = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    for name in ("twin", "triplet"):
        proto.graph.initializer.add().CopyFrom(proto.graph.initializer[0])
        proto.graph.initializer[-1].name = name
    Model.load(saved(proto, tmp_path / "a.onnx")).save(tmp_path / "b.onnx")
    (data,) = tmp_path.glob("b.onnx.*.data")
    assert data.stat().st_size == ODD * 4
    assert [numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(tmp_path / "b.onnx").graph.initializer] == [
        raw(TensorProto.FLOAT).raw_data] * 3


def test_the_same_model_gives_the_same_bytes(tmp_path):
    path = transformer(2, 32, 128).save(tmp_path / "a.onnx")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Model.load(path).save(tmp_path / folder / "m.onnx", external=True)
        Model.load(path).save(tmp_path / folder / "inside.onnx", external=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 3


def test_weights_begin_where_memory_can_be_mapped(tmp_path):
    proto = holding(raw(TensorProto.FLOAT), raw(TensorProto.INT4), raw(TensorProto.DOUBLE))
    Model.load(saved(proto, tmp_path / "a.onnx")).save(tmp_path / "b.onnx", external=True)
    stored = read_model(tmp_path / "b.onnx")
    assert [values.offset % 64 for values in stored.values.values()] == [0, 0, 0]


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_the_output_may_be_the_input(tmp_path, external):
    proto = transformer(2, 32, 128).model()
    path = saved(proto, tmp_path / "m.onnx")
    for _ in range(3):
        Model.load(path).save(path, external=external)
    assert loaded(path) == proto
    assert len(contents(tmp_path)) == 1 + external


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_a_model_can_be_used_after_its_file_was_written_over(tmp_path, external):
    proto = transformer(2, 32, 128).model()
    Model.load(saved(proto, tmp_path / "m.onnx")).save(tmp_path / "m.onnx", external=external)
    model = Model.load(tmp_path / "m.onnx")
    saved(transformer(2, 32, 128, seed=5).model(), tmp_path / "other.onnx")
    Model.load(tmp_path / "other.onnx").save(tmp_path / "m.onnx")
    model.save(tmp_path / "again.onnx", external=False)
    assert loaded(tmp_path / "again.onnx") == proto


def test_the_data_file_of_the_old_model_goes_with_it(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    other = saved(transformer(2, 32, 128, seed=5).model(), tmp_path / "n.onnx")
    Model.load(other).save(path)
    assert set(contents(tmp_path)) == {"m.onnx", "n.onnx"}


def test_a_file_that_is_hardly_weights_stays(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="thesis.pdf", size_threshold=0)
    data = (tmp_path / "thesis.pdf").read_bytes()
    (tmp_path / "thesis.pdf").write_bytes(data + bytes(2 * len(data)))
    Model.load(path).save(path, external=False)
    assert set(contents(tmp_path)) == {"m.onnx", "thesis.pdf"}


def test_an_old_model_whose_data_lies_at_no_text_is_written_over(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.write_bytes(path.read_bytes().replace(b"weights.bin", b"weights.bi\xff"))
    proto = transformer(2, 32, 128, seed=5).model()
    Model.load(saved(proto, tmp_path / "n.onnx")).save(path)
    assert loaded(path) == proto


def test_the_data_file_of_the_old_model_stays_where_another_model_names_it(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "twin.onnx").write_bytes(path.read_bytes())
    twin = loaded(tmp_path / "twin.onnx")
    Model.load(saved(transformer(2, 32, 128, seed=5).model(), tmp_path / "n.onnx")).save(path)
    assert (tmp_path / "weights.bin").exists()
    assert loaded(tmp_path / "twin.onnx") == twin


@pytest.mark.parametrize("name", ["m.onnx", "m", "model.bin", "ffnfold:weight.onnx", "ü ñ.onnx", "[a]*.onnx", ".hidden.onnx",
                                  "m.onnx.0123456789abcdef.data"])
def test_a_model_may_have_any_name(tmp_path, name):
    proto = transformer(2, 32, 128).model()
    source = tmp_path / "source" / "m.onnx"
    source.parent.mkdir()
    saved(proto, source)
    (tmp_path / "out").mkdir()
    for _ in range(3):
        Model.load(source).save(tmp_path / "out" / name, external=True)
        assert loaded(tmp_path / "out" / name) == proto
    assert len(contents(tmp_path / "out")) == 2
    Model.load(tmp_path / "out" / name).save(tmp_path / "out" / name)
    assert loaded(tmp_path / "out" / name) == proto


def breaking_off(path: Path, then) -> tuple[onnx.ModelProto, dict]:
    """The model at ``path`` with a weight in its middle that calls ``then`` when it is written."""
    stored = read_model(path)
    keys = list(stored.values)
    middle = stored.values[keys[len(keys) // 2]]
    return stored.proto, {**stored.values, keys[len(keys) // 2]: ComputedValues(middle.shape, middle.onnx_type, then)}


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
@pytest.mark.parametrize("before", ["nothing", "inside", "external"])
def test_a_weight_that_fails_leaves_everything_as_it_was(tmp_path, external, before):
    source = saved(transformer(2, 32, 128).model(), tmp_path / "source.onnx")
    folder = tmp_path / "out"
    folder.mkdir()
    if before != "nothing":
        Model.load(source).save(folder / "m.onnx", external=before == "external")
    old = contents(folder)

    def fail() -> np.ndarray:
        raise RuntimeError("no such number")

    with pytest.raises(RuntimeError, match="no such number"):
        write_model(*breaking_off(source, fail), folder / "m.onnx", external)
    assert contents(folder) == old


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_a_weight_of_the_wrong_size_is_not_written(tmp_path, external):
    source = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    old = contents(tmp_path)
    with pytest.raises(ValueError, match="declared"):
        write_model(*breaking_off(source, lambda: np.zeros((3, 3))), source, external)
    assert contents(tmp_path) == old


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_a_full_disk_is_one_line_and_leaves_everything_as_it_was(tmp_path, external):
    source = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    old = contents(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(InputError, match="cannot be written") as raised:
            Model.load(source).save(source, external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(str(raised.value).splitlines()) == 1
    assert contents(tmp_path) == old


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_a_killed_run_leaves_the_old_model_and_the_next_run_cleans_up(tmp_path, external):
    source = saved(transformer(2, 32, 128).model(), tmp_path / "source.onnx")
    folder = tmp_path / "out"
    folder.mkdir()
    Model.load(source).save(folder / "m.onnx", external=True)
    old = contents(folder)
    script = f"""
import os, signal
from pathlib import Path
from ffnfold.graph.save import write_model
from ffnfold.graph.store import read_model
from ffnfold.graph.weights import ComputedValues
stored = read_model(Path({str(source)!r}))
*_, last = stored.values
die = ComputedValues(stored.values[last].shape, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
write_model(stored.proto, {{**stored.values, last: die}}, Path({str(folder / "m.onnx")!r}), {external})
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = contents(folder)
    assert set(left) > set(old)
    assert {name: left[name] for name in old} == old
    onnx.load(folder / "m.onnx")
    Model.load(source).save(folder / "m.onnx", external=True)
    assert contents(folder) == old


def test_a_data_file_that_a_killed_run_gave_its_name_is_removed(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    (tmp_path / "m.onnx.0123456789abcdef.data").write_bytes(b"whole, but the run died before the model named it")
    (tmp_path / "other.onnx.0123456789abcdef.data").write_bytes(b"not of this model")
    (tmp_path / "m.onnx.data").write_bytes(b"not ours")
    Model.load(path).save(path)
    assert set(contents(tmp_path)) == {"m.onnx", "other.onnx.0123456789abcdef.data", "m.onnx.data"}


def test_what_a_living_run_writes_is_left_alone(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    other = saved(transformer(2, 32, 128, seed=5).model(), tmp_path / "other.onnx")
    proto = loaded(other)
    with Model.load(other).stage(path, external=True) as staged:
        Model.load(path).save(path)
        assert staged.temporary.exists()
        staged.commit()
    assert loaded(path) == proto
    assert len(contents(tmp_path)) == 3


def test_a_staged_model_can_be_loaded_and_thrown_away(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    old = contents(tmp_path)
    for external in (False, True):
        with Model.load(path).stage(tmp_path / "n.onnx", external=external) as staged:
            feed = {"x": np.ones((1, 3, 32), np.float32)}
            np.testing.assert_array_equal(run(staged.temporary, feed)["y"], run(path, feed)["y"])
        assert contents(tmp_path) == old


def test_throwing_a_staged_model_away_keeps_data_that_was_there_before(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    Model.load(path).save(path, external=True)
    old = contents(tmp_path)
    with Model.load(path).stage(path):
        pass
    assert contents(tmp_path) == old


def test_permissions_stay(tmp_path):
    path = saved(transformer(1).model(), tmp_path / "m.onnx")
    path.chmod(0o600)
    Model.load(path).save(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_places_that_cannot_be_written_are_one_line(tmp_path):
    model = Model.load(saved(transformer(1).model(), tmp_path / "m.onnx"))
    old = contents(tmp_path)
    for place, words in ((tmp_path / "nowhere" / "m.onnx", "no folder"), (tmp_path, "is a folder"),
                         (tmp_path / ("m" * 300), "cannot be written")):
        with pytest.raises(InputError, match=words) as raised:
            model.save(place)
        assert len(str(raised.value).splitlines()) == 1
    assert contents(tmp_path) == old


def test_a_large_weight_is_written_in_tiles(tmp_path):
    """20 MB in groups of rows; what comes out is what the whole would have been."""
    rows = np.random.default_rng(0).standard_normal((1000, 5000)).astype(np.float32)
    asked: list[tuple[int, int]] = []

    def some(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return rows[start:stop]

    weight = ComputedValues(rows.shape, TensorProto.FLOAT, lambda: pytest.fail("computed whole"), some)
    tensor, key = tensor_proto("w", weight)
    write_model(holding(tensor), {key: weight}, tmp_path / "m.onnx")
    assert len(asked) > 3
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0]), rows)


def test_a_large_weight_goes_from_file_to_file(tmp_path):
    """Weights whose hash is known are copied by the kernel where it can; the bytes are the same."""
    big = np.random.default_rng(0).standard_normal(2 << 20).astype(np.float32)
    stored = read_model(saved(holding(numpy_helper.from_array(big, "w")), tmp_path / "a.onnx"))
    (values,) = stored.values.values()
    assert isinstance(values, StoredValues)
    values.digest()
    write_model(stored.proto, stored.values, tmp_path / "b.onnx", external=True)
    write_model(stored.proto, stored.values, tmp_path / "c.onnx")
    for name in ("b.onnx", "c.onnx"):
        np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(tmp_path / name).graph.initializer[0]), big)
    assert (tmp_path / "c.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()


def test_arrays_made_by_a_pass_keep_their_type(tmp_path):
    s = Sketch()
    s.op("Identity", s.input("x", [2]), out=s.output("y", [2]))
    model = Model.load(s.save(tmp_path / "a.onnx"))
    from ffnfold.graph.builder import Builder

    build = Builder(model, model.graph, "/new")
    for array in (np.arange(9000).astype(ml_dtypes.bfloat16), np.arange(9000).astype(np.int8), np.arange(3).astype(np.int64)):
        build.op("Identity", build.constant_as(array, helper.np_dtype_to_tensor_dtype(array.dtype), "made"))
    model.save(tmp_path / "b.onnx")
    found = [tensor.data_type for tensor in onnx.load(tmp_path / "b.onnx").graph.initializer]
    assert found == [TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.INT64]


def test_nothing_holds_files_open_when_a_model_is_gone(tmp_path):
    path = saved(transformer(2, 32, 128).model(), tmp_path / "m.onnx")
    Model.load(path).save(path, external=True)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Model.load(path).save(tmp_path / "n.onnx")
    import gc

    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
