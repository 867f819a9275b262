"""Hostile files, through the command line in a process of its own: an answer or one line, in bounded time and memory.

One process takes all of them in turn, so that the peak of its memory is that of the worst so far. For each file it runs
``inspect`` and ``optimize`` with the exact plan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from ffn_graphs import Sketch, transformer
from ffnfold.cli import main
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model
from ffnfold.graph.wire import encode_header, encode_varint
from onnx import ModelProto, TensorProto, helper

SECONDS, MEGABYTES = 8, 400
_PROCESS = """
import contextlib, io, json, os, resource, sys, time
from ffnfold.cli import main
from ffnfold.passes.plan import EXACT_PLAN

answers, sys.stdout = sys.stdout, sys.stderr
plan = [text for name in EXACT_PLAN for text in ("-p", name)]

def run(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as error:
            code = error.code or 0
    return code, said.getvalue()

for line in sys.stdin:
    model, output = json.loads(line)
    started = time.process_time()
    results = [run("inspect", model, "--json"), run("optimize", model, "-o", output, "--no-verify", "--json", *plan)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    print(json.dumps([results, time.process_time() - started, peak]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", _PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        yield running
        running.kill()


@pytest.fixture
def attempt(process, tmp_path) -> Callable[[Path], list[tuple[int, str]]]:
    """Runs both commands on a file. Returns their exit codes and what they said; time and memory must be bounded."""

    def run(path: Path) -> list[tuple[int, str]]:
        before = contents(path.parent)
        process.stdin.write(json.dumps([str(path), str(path.parent / "out.onnx")]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the process died: {process.wait(10)}"
        results, seconds, peak = json.loads(answer)
        assert seconds < SECONDS
        assert peak < MEGABYTES
        after = contents(path.parent)
        for code, said in results:
            assert code in (0, 2)
            assert "Traceback" not in said
            assert len(said.splitlines()) == (1 if code else 0), said
            assert len(said) < 3000
        if results[-1][0]:
            assert after == before, "something was written"
        else:
            onnx.load(path.parent / "out.onnx", load_external_data=False)
        assert {name: after.get(name) for name in before} == before
        return results

    return run


@pytest.fixture
def refused(attempt) -> Callable[..., None]:
    """Both commands end with exit code 2 and a line that names the file and says ``words``."""

    def run(path: Path, *words: str) -> None:
        for code, said in attempt(path):
            assert code == 2
            assert said.startswith(f"ffnfold: {path}"), said
            for word in words:
                assert word in said, said

    return run


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of what is in ``folder``."""
    return {entry.name: (entry.stat(follow_symlinks=False).st_size, entry.stat(follow_symlinks=False).st_mtime_ns)
            for entry in os.scandir(folder)}


def written(path: Path, data: bytes | ModelProto) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.SerializeToString())
    return path


def blob(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return encode_header(number, len(content)) + content


MODEL = transformer(2, 16, 64).model()
BYTES = MODEL.SerializeToString()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.2, 0.5, 0.8, 0.99, 0.9999])
def test_truncated(refused, tmp_path, part):
    refused(written(tmp_path / "m.onnx", BYTES[:int(len(BYTES) * part)]), "m.onnx")


def test_a_model_followed_by_half_a_field(refused, tmp_path):
    refused(written(tmp_path / "m.onnx", BYTES + b"\x3a\x90\x03"), "early")


@pytest.mark.parametrize("seed", range(40))
def test_bits_flipped(attempt, tmp_path, seed):
    random = np.random.default_rng(seed)
    data = bytearray(BYTES)
    for _ in range(random.integers(1, 10)):
        data[random.integers(len(data))] ^= 1 << random.integers(8)
    attempt(written(tmp_path / "m.onnx", bytes(data)))


@pytest.mark.parametrize("size", [1, 7, 1000, 1_000_000])
def test_random_bytes(refused, tmp_path, size):
    refused(written(tmp_path / "m.onnx", np.random.default_rng(size).bytes(size)), "not an ONNX model")


@pytest.mark.parametrize("form", ["of one node", "of two", "of many", "through a body"])
def test_cycles(refused, tmp_path, form):
    s = Sketch()
    s.input("x", [None, 4])
    if form == "of one node":
        s.op("Add", "x", "a", out="a")
    elif form == "through a body":
        inner = Sketch()
        inner.op("Relu", "a", out=inner.output("t"))
        s.op("If", s.weight(np.array(True)), out="a", then_branch=inner.graph(), else_branch=inner.graph())
    else:
        count = 2 if form == "of two" else 5000
        for number in range(count):
            s.op("Add", "x", f"a{(number or count) - 1}", out=f"a{number}")
    s.op("Identity", s.nodes[-1].output[0], out=s.output("y"))
    refused(written(tmp_path / "m.onnx", s.model()), "cycle")


@pytest.mark.parametrize(("change", "word"), [
    (lambda graph: graph.node[2].input.__setitem__(0, "nobody's"), "nobody's"),
    (lambda graph: graph.output.add(name="nobody's"), "nobody's"),
    (lambda graph: graph.node.add().CopyFrom(graph.node[2]), "twice"),
    (lambda graph: graph.initializer.add().CopyFrom(graph.initializer[0]), "twice"),
    (lambda graph: graph.input.add().CopyFrom(graph.input[0]), "twice"),
    (lambda graph: graph.node[2].output.__setitem__(0, graph.initializer[0].name), "twice"),
    (lambda graph: graph.node[2].output.extend(["a", "a"]), "twice")])
def test_names_undefined_and_defined_twice(refused, tmp_path, change, word):
    model = ModelProto()
    model.CopyFrom(MODEL)
    change(model.graph)
    refused(written(tmp_path / "m.onnx", model), word)


@pytest.mark.parametrize("dims", [[1 << 62], [1 << 31, 1 << 31], [1 << 32, 1 << 32], [(1 << 63) - 1] * 3, [3] * 64, [-1],
                                  [-(1 << 63)], [0, 1 << 62]])
@pytest.mark.parametrize("place", ["few numbers", "many numbers", "none", "outside", "in a Constant"])
def test_sizes_that_overflow_and_dimensions_that_disagree_with_the_bytes(refused, tmp_path, dims, place):
    numbers = {"few numbers": 16, "many numbers": 4096, "in a Constant": 4096}.get(place, 0)
    if 0 in dims:
        numbers = numbers or 16
    tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, raw_data=bytes(numbers))
    if place == "outside":
        (tmp_path / "w.bin").write_bytes(bytes(4096))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="w.bin")
        tensor.external_data.add(key="length", value="4096")
    s = Sketch()
    weight = s.op("Constant", value=tensor) if place == "in a Constant" else s.weight(tensor, "w")
    s.op("Mul", s.input("x", [None, 4]), weight, out=s.output("y"))
    refused(written(tmp_path / "m.onnx", s.model()), "'w'")


@pytest.mark.parametrize("kind", ["float_data", "int32_data", "string_data"])
def test_lists_of_numbers_that_are_not_as_many_as_the_dimensions_say(refused, tmp_path, kind):
    types = {"float_data": TensorProto.FLOAT, "int32_data": TensorProto.INT32, "string_data": TensorProto.STRING}
    tensor = TensorProto(name="w", dims=[1 << 62], data_type=types[kind])
    getattr(tensor, kind).extend([b"a"] * 2000 if kind == "string_data" else [1] * 2000)
    s = Sketch()
    s.op("Identity", s.weight(tensor, "w"), out=s.output("y"))
    refused(written(tmp_path / "m.onnx", s.model()), "'w'")


def outside(path: Path, **entries: str) -> Path:
    """A model whose weight has these entries of external data, in a folder of its own."""
    path.parent.mkdir()
    tensor = TensorProto(name="w", dims=[4, 4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    s = Sketch()
    s.op("MatMul", s.input("x", [None, 4]), s.weight(tensor, "w"), out=s.output("y"))
    return written(path, s.model())


@pytest.mark.parametrize("location", ["/etc/passwd", "{folder}/secret", "../secret", "sub/../../secret", "./../secret", "..", ".",
                                      "", "..\\secret", "C:\\secret", "file:///etc/passwd", "link", "chain", "folder/secret",
                                      "/dev/zero", "fifo", "secret\0", "~/secret", "loop"])
def test_external_data_that_is_absolute_climbs_out_or_is_a_link_out(refused, tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(64))
    path = outside(tmp_path / "model" / "m.onnx", location=location.format(folder=tmp_path))
    (path.parent / "link").symlink_to("../secret")
    (path.parent / "chain").symlink_to("link")
    (path.parent / "folder").symlink_to("..")
    (path.parent / "loop").symlink_to("loop")
    os.mkfifo(path.parent / "fifo")
    refused(path)


@pytest.mark.parametrize("text", ["weights.bin", "location", "64"])
def test_external_data_in_bytes_that_are_no_text(refused, tmp_path, text):
    path = outside(tmp_path / "model" / "m.onnx", location="weights.bin", offset="0", length="64")
    (path.parent / "weights.bin").write_bytes(bytes(64))
    data, field = path.read_bytes(), bytes([len(text)]) + text.encode()
    assert data.count(field) == 1
    path.write_bytes(data.replace(field, field[:-1] + b"\x80"))
    refused(path)


@pytest.mark.parametrize(("offset", "length"), [
    ("1", "64"), ("64", "64"), (str(1 << 62), "64"), (str((1 << 63) - 1), "64"), ("0", "65"), ("0", str(1 << 63)), ("-1", "64"),
    ("0x10", "64"), ("", ""), ("0", "9" * 400), ("١", "64")])
def test_external_offsets_past_the_end(refused, tmp_path, offset, length):
    path = outside(tmp_path / "model" / "m.onnx", location="w.bin", offset=offset, length=length)
    (path.parent / "w.bin").write_bytes(bytes(64))
    refused(path)


@pytest.mark.parametrize("padding", [0, 2000], ids=["small", "large"])
def test_subgraphs_nested_a_thousand_deep(refused, tmp_path, padding):
    graph = blob(2, b"innermost") + blob(10, b"d" * padding)
    for _ in range(1000):
        attribute = blob(1, b"then_branch") + blob(6, graph) + encode_varint(20 << 3) + b"\x05"
        graph = blob(1, blob(1, b"c") + blob(2, b"y") + blob(4, b"If") + blob(5, attribute))
    model = b"\x08\x0a" + blob(7, graph) + blob(8, b"\x10\x11")
    refused(written(tmp_path / "m.onnx", model), "m.onnx")


def test_subgraphs_nested_as_deep_as_protobuf_allows(attempt, tmp_path):
    other = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "e", [], [helper.make_empty_tensor_value_info("y")])
    graph = other
    for _ in range(28):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=other)
        graph = helper.make_graph([node], "g", [], [helper.make_empty_tensor_value_info("y")])
    graph.input.extend([helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
                        helper.make_tensor_value_info("c", TensorProto.BOOL, [])])
    graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2]))
    attempt(written(tmp_path / "m.onnx", helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])))


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "description of the model": lambda text: BYTES + blob(6, text),
    "name of the producer": lambda text: BYTES + blob(2, text),
    "metadata": lambda text: BYTES + blob(14, blob(1, b"k") + blob(2, text)),
    "domain of an operator set": lambda text: BYTES + blob(8, blob(1, text) + b"\x10\x01"),
    "name of the graph": lambda text: BYTES + blob(7, blob(2, text)),
    "name of a node": lambda text: BYTES + blob(7, blob(1, blob(3, text))),
    "operator": lambda text: BYTES + blob(7, blob(1, blob(4, text))),
    "name of a value": lambda text: BYTES + blob(7, blob(1, blob(1, text) + blob(4, b"Relu"))),
    "name of an input": lambda text: BYTES + blob(7, blob(11, blob(1, text))),
    "attribute": lambda text: BYTES + blob(7, blob(1, blob(4, b"Relu") + blob(5, blob(1, b"a") + blob(4, text)))),
    "name of a tensor": lambda text: BYTES + blob(7, blob(5, blob(8, text))),
    "text in a tensor": lambda text: BYTES + blob(7, blob(5, b"\x08\x01\x10\x08" + blob(6, text) + blob(8, b"t"))),
    "external location": lambda text: BYTES + blob(7, blob(5, blob(13, blob(1, b"location") + blob(2, text)))),
    "field that is not known": lambda text: BYTES + blob(999, text),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_100_mb(refused, tmp_path, kind):
    refused(written(tmp_path / "m.onnx", TEXTS[kind](b"t" * 100_000_000)), "100000")
    (tmp_path / "m.onnx").unlink()


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_1_mb(attempt, tmp_path, kind):
    attempt(written(tmp_path / "m.onnx", TEXTS[kind](b"t" * 1_000_000)))


@pytest.mark.parametrize("field", [blob(1, b""), blob(5, b""), blob(1, blob(1, b""))], ids=["nodes", "tensors", "empty inputs"])
def test_more_empty_messages_than_a_model_has(refused, tmp_path, field):
    refused(written(tmp_path / "m.onnx", BYTES + blob(7, field * 300_000)), "m.onnx")


@pytest.mark.parametrize("field", [blob(13, b""), blob(14, b"")], ids=["value_info", "annotations"])
def test_empty_messages_without_number_that_do_no_harm(attempt, tmp_path, field):
    attempt(written(tmp_path / "m.onnx", BYTES + blob(7, field * 100_000)))


def test_the_same_weight_named_by_many_tensors_costs_its_bytes_once(attempt, tmp_path):
    """A zip bomb of a model: 1 MB of data that 300 initializers name would be 300 MB."""
    (tmp_path / "w.bin").write_bytes(bytes(1 << 20))
    s = Sketch()
    x = s.input("x", [None, 512])
    for number in range(300):
        tensor = TensorProto(name=f"w{number}", dims=[512, 512], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="w.bin")
        x = s.op("Add", x, s.op("MatMul", x, s.weight(tensor, tensor.name)))
    s.op("Relu", x, out=s.output("y", [None, 512]))
    assert [code for code, _ in attempt(written(tmp_path / "m.onnx", s.model()))] == [0, 0]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 8 << 20


def test_a_full_disk(tmp_path):
    """A file system of 1 MB, where the user may make one; RLIMIT_FSIZE is tried in test_killed.py."""
    room = tmp_path / "room"
    room.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", room], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        model = written(tmp_path / "m.onnx", transformer(2, 128, 512).model())
        assert model.stat().st_size > 1 << 20
        old = written(room / "out.onnx", BYTES)
        for output in (old, room / "new.onnx"):
            done = subprocess.run([sys.executable, "-m", "ffnfold", "optimize", str(model), "-o", str(output), "--no-verify",
                                   "-p", "fold-norm"], capture_output=True, text=True, check=False)
            assert done.returncode == 2
            assert len(done.stderr.splitlines()) == 1
            assert "No space left" in done.stderr
            assert {file.name for file in room.iterdir()} == {"out.onnx"}
            assert old.read_bytes() == BYTES
    finally:
        subprocess.run(["umount", room], check=True)


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
def locked() -> Iterator[Path]:
    """A model in a folder that everybody may read and nobody write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "models"
        folder.mkdir()
        path = written(folder / "m.onnx", BYTES)
        CliRunner().invoke(main, ["optimize", str(path), "-o", f"{name}/out.onnx", "--no-verify"])  # to import it all as root
        Path(name).chmod(0o755)
        path.chmod(0o444)
        folder.chmod(0o555)
        yield path
        folder.chmod(0o755)


def test_a_folder_that_may_only_be_read(locked, nobody):
    for output in ("m.onnx", "new.onnx"):
        arguments = ["optimize", str(locked), "-o", str(locked.with_name(output)), "--no-verify", "-p", "fold-norm"]
        done = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert done.exit_code == 2
        assert len(done.stderr.splitlines()) == 1
        assert "cannot be written" in done.stderr
    assert locked.read_bytes() == BYTES
    assert [file.name for file in locked.parent.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("form", ["inside", "outside", "through a link", "through another spelling"])
def test_the_output_is_the_input(tmp_path, form):
    settings = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0} if form == "outside" else {}
    path = transformer(2, 32, 128).save(tmp_path / "m.onnx", **settings)
    output = path
    if form == "through a link":
        output = tmp_path / "link.onnx"
        output.symlink_to("m.onnx")
    elif form == "through another spelling":
        output = tmp_path / ".." / tmp_path.name / "m.onnx"
    command = [sys.executable, "-m", "ffnfold", "optimize", str(path), "--no-verify", "-p", "fold-norm", "-o"]
    subprocess.run([*command, str(tmp_path / "elsewhere.onnx")], check=True, capture_output=True)
    expected = onnx.load(tmp_path / "elsewhere.onnx").graph
    subprocess.run([*command, str(output)], check=True, capture_output=True)
    assert onnx.load(output).graph == expected
    assert len(onnx.load(path).graph.node) == len(expected.node)  # and the input, where the output is a link to it


def test_a_node_of_another_domain_that_reads_nothing(tmp_path):
    """It has the name of an operator that passes features on, and no input to take them from."""
    s = Sketch()
    x = s.input("x", [None, 4])
    hidden = s.op("Relu", s.op("MatMul", x, s.weight(np.ones((4, 4), np.float32))))
    y = s.op("MatMul", hidden, s.weight(np.ones((4, 4), np.float32)))
    s.op("Add", x, y, out=s.output("y"))
    model = s.model()
    product = model.graph.node[0]
    product.op_type, product.domain = "Transpose", "x"
    del product.input[:]
    model.opset_import.add(domain="x", version=1)
    path = written(tmp_path / "m.onnx", model)
    assert not list(find_ffn_blocks(Model.load(path)))
