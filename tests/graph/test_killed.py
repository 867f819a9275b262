"""A save that is killed, or finds no room, at any step: the old model or the new one, whole, and a tidy folder after the next."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from ffn_graphs import transformer
from ffnfold.graph.errors import InputError
from ffnfold.graph.model import Model

# A process that never starts a thread forks a child for every step; an audit hook kills the child just before the step.
_SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
import onnx
from ffnfold.graph.model import Model

folder, source, external = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "external"
STEPS = ("open", "os.rename", "os.remove")

def save(path, step=None):
    model = Model.load(path)
    model.metadata = lambda: {"mark": "new"}
    if step is not None:
        seen = iter(range(1000))
        sys.addaudithook(lambda event, _: event in STEPS and next(seen) == step and os.kill(os.getpid(), signal.SIGKILL))
    model.save(path, external=external)

def child(job, *arguments):
    process = os.fork()
    if not process:
        try:
            job(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

results = []
for step in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = folder / "m.onnx"
    old = onnx.load(path).graph
    for tensor in old.initializer:
        tensor.ClearField("data_location")
    code = child(save, path, step)
    found = onnx.load(path)
    for tensor in found.graph.initializer:
        tensor.ClearField("data_location")
    whole = found.graph == old
    mark = [entry.value for entry in found.metadata_props if entry.key == "mark"]
    again = child(save, path)
    named = {entry.value for tensor in onnx.load(path, load_external_data=False).graph.initializer
             for entry in tensor.external_data if entry.key == "location"}
    left = sorted({file.name for file in folder.iterdir()} - named - {"m.onnx"})
    results.append((code, whole, mark, again, left))
    if code == 0:
        break
print(json.dumps(results))
"""


@pytest.mark.parametrize("external", ["inside", "external"])
@pytest.mark.parametrize("before", ["inside", "external", "data of another tool"])
def test_a_save_killed_before_any_of_its_steps_leaves_the_old_model_or_the_new_one(tmp_path, before, external):
    source = tmp_path / "source"
    source.mkdir()
    settings = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    transformer(1, 32, 128).save(source / "m.onnx", **settings if before == "data of another tool" else {})
    if before == "external":
        Model.load(source / "m.onnx").save(source / "m.onnx", external=True)
    done = subprocess.run([sys.executable, "-c", _SCRIPT, str(tmp_path / "run"), str(source), external],
                          capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert len(results) > 4
    assert [code for code, *_ in results] == [-9] * (len(results) - 1) + [0]
    marks = [mark for _, _, mark, _, _ in results]
    assert marks == sorted(marks)  # once the new model is there it stays
    assert marks[0] == []
    for step, (_, whole, _, again, left) in enumerate(results):
        assert whole, f"step {step}: neither the old model nor the new one"
        assert again == 0, f"step {step}: the next save failed"
        assert not left, f"step {step}: left behind {left}"


def test_the_data_of_the_old_model_stays_while_a_model_that_cannot_be_read_may_name_it(tmp_path):
    transformer(1, 32, 128).save(tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin")
    (tmp_path / "other.onnx").write_bytes(b"\x3a\xff\xff\xff\xff\x0f half a model")
    Model.load(tmp_path / "m.onnx").save(tmp_path / "m.onnx", external=False)
    assert (tmp_path / "weights.bin").exists()


def test_the_data_of_the_old_model_stays_while_another_model_names_it_in_another_way(tmp_path):
    transformer(1, 32, 128).save(tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin")
    other = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in other.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "./weights.bin" if entry.key == "location" else entry.value
    other.graph.node[0].op_type = "NoSuchOperator"  # and not one that could be run
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    Model.load(tmp_path / "m.onnx").save(tmp_path / "m.onnx", external=False)
    assert (tmp_path / "weights.bin").exists()


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return transformer(2, 32, 128).save(folder / "m.onnx", save_as_external_data=True, location="weights.bin")


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may write everywhere, so be somebody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def locked(model) -> Iterator[Path]:
    """The model in a folder that everybody may read and nobody write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "models"
        shutil.copytree(model.parent, folder)
        Path(name).chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)
        folder.chmod(0o555)
        yield folder / "m.onnx"
        folder.chmod(0o755)


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_a_folder_that_may_not_be_written_to_is_one_line(locked, nobody, external):
    old = {file.name: file.read_bytes() for file in locked.parent.iterdir()}
    with pytest.raises(InputError, match="cannot be written") as raised:
        Model.load(locked).save(locked, external=external)
    assert len(str(raised.value).splitlines()) == 1
    assert {file.name: file.read_bytes() for file in locked.parent.iterdir()} == old


@pytest.mark.parametrize(("output", "room"), [("m.onnx", 100), ("m.onnx", 20_000), ("m.onnx", 60_000), ("n.onnx", 0)])
def test_a_file_that_may_not_grow_is_one_line_and_exit_2(model, output, room):
    old = {file.name: file.read_bytes() for file in model.parent.iterdir()}

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    done = subprocess.run([sys.executable, "-m", "ffnfold", "optimize", str(model), "-o", str(model.with_name(output)),
                           "--no-verify", "-p", "fold-bias"], preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert {file.name: file.read_bytes() for file in model.parent.iterdir()} == old


def test_what_is_written_over_the_input_is_what_is_written_elsewhere(model):
    Model.load(model).save(model.with_name("n.onnx"), external=True)
    expected = onnx.load(model.with_name("n.onnx"))
    Model.load(model).save(model)
    assert onnx.load(model).graph == expected.graph
    assert all(np.isfinite(onnx.numpy_helper.to_array(tensor)).all() for tensor in expected.graph.initializer)
    assert {file.name for file in model.parent.iterdir() if file.suffix != ".data"} == {"m.onnx", "n.onnx"}
