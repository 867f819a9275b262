"""Time and memory of the exact plan on large files, against ``cp`` of the same files.

    python benchmarks/any_size.py --folder DIR [--gemma MODEL.onnx] [--peers PYTHON] [--repeats 3] [--json FILE]

Makes a decoder of 6 GB with external data and one of 1.9 GB with its weights inside the protobuf (float16, shapes of a
7B model, random numbers) in DIR, which needs 20 GB, and removes them afterwards. The plan rewrites something in both:
constants that are added twice, and two matrices in a row. Every run is a process of its own; ``cp`` and ``ffnfold`` take
turns, each with the input in the page cache and nothing waiting to be written. ``cp`` leaves its output to be written to
the disk some time; ``ffnfold`` waits for the disk, and so does "cp, synced". Beside them it prints how long SHA-256 of those
files takes alone, which every rewritten model carries of its input. Python may keep its compiled modules, as it does where
nobody forbids it.

MODEL.onnx is Gemma 3 270M as ``ffnfold models get gemma3-270m`` makes it. PYTHON is an interpreter that has onnxslim and onnxsim;
they run on the same file once.

Exit code 1 if a limit is missed: 500 MB and 3 times cp; 400 MB and 3 seconds on Gemma.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ffnfold.graph.save import write_model
from ffnfold.graph.store import read_model
from ffnfold.graph.weights import ComputedValues, StoredValues, Values, tensor_proto
from ffnfold.passes.plan import EXACT_PLAN
from onnx import ModelProto, TensorProto, helper

D_MODEL, D_FF, HEADS, D_PROJECTED = 4096, 11008, 32, 1024
PLAN = [text for name in EXACT_PLAN for text in ("-p", name)]
PEERS = {"onnxslim": "import onnxslim,sys;onnxslim.slim(sys.argv[1],sys.argv[2],save_as_external_data=True)",
         "onnxsim": "import onnx,onnxsim,sys;m,ok=onnxsim.simplify(onnx.load(sys.argv[1]));"
                    "onnx.save(m,sys.argv[2],save_as_external_data=True)"}


def main() -> int:
    """Measure and print; exit code 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gemma", type=Path)
    parser.add_argument("--peers", type=Path, metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default="6 GB external,1.9 GB inside", help="which of the two to make")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "any_size.json")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    if arguments.gemma is not None:
        results.append(measure("gemma3-270m", arguments.gemma, arguments.folder, arguments.repeats))
        results[-1]["ok"] = results[-1]["seconds"] < 3 and results[-1]["peak_mb"] < 400
        show(results[-1])
        if arguments.peers is not None:
            results += [peer(name, arguments.peers, arguments.gemma, arguments.folder) for name in PEERS]
    for name, layers, vocabulary, external in (("6 GB external", 14, 32000, True), ("1.9 GB inside", 4, 16000, False)):
        if name not in arguments.sizes.split(","):
            continue
        source = arguments.folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        try:
            decoder(source / "model.onnx", layers, vocabulary, external)
            results.append(measure(name, source / "model.onnx", arguments.folder, arguments.repeats))
        finally:
            shutil.rmtree(source)
        results[-1]["ok"] = results[-1]["times_cp"] < 3 and results[-1]["peak_mb"] < 500 and results[-1]["fired"] > 0
        show(results[-1])
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result.get("ok", True) for result in results) else 1


def measure(name: str, model: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """The exact plan on ``model`` and ``cp`` of its files, in turns."""
    files = [model, *sorted({values.source.path for values in read_model(model).values.values()
                             if isinstance(values, StoredValues)} - {model})]
    ffnfold = [sys.executable, "-m", "ffnfold", "optimize", "--no-verify", "--json", *PLAN, str(model), "-o"]
    ours, copies, synced = [], [], []
    fired = 0
    for _ in range(repeats):
        for kind in ("cp", "ffnfold", "cp, synced"):
            target = folder / "target"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            settle(files)
            if kind == "ffnfold":
                ours.append(run([*ffnfold, str(target / "model.onnx")]))
                fired = sum(each["fired"] for each in json.loads(ours[-1]["output"])["passes"])
                check(model, target / "model.onnx")
            elif kind == "cp":
                copies.append(run(["cp", *map(str, files), str(target)])["seconds"])
            else:
                synced.append(run(["sh", "-c", 'cp "$@" && sync', "sh", *map(str, files), str(target)])["seconds"])
            shutil.rmtree(target)
    middle = statistics.median
    return {"model": name, "bytes": sum(file.stat().st_size for file in files), "fired": fired,
            "seconds": middle(each["seconds"] for each in ours), "all_seconds": [each["seconds"] for each in ours],
            "peak_mb": max(each["peak_mb"] for each in ours), "cp_seconds": middle(copies), "cp_all_seconds": copies,
            "cp_synced_seconds": middle(synced), "sha256_seconds": hashing(files),
            "times_cp": middle(mine["seconds"] / other for mine, other in zip(ours, copies, strict=True)),
            "times_cp_synced": middle(mine["seconds"] / other for mine, other in zip(ours, synced, strict=True))}


def hashing(files: Sequence[Path]) -> float:
    """Seconds that SHA-256 of ``files`` takes, with nothing beside it."""
    before = time.perf_counter()
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        hasher = hashlib.sha256()
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                hasher.update(buffer[:count])
    return time.perf_counter() - before


def peer(name: str, python: Path, model: Path, folder: Path) -> dict[str, Any]:
    """Another optimizer on ``model``, once."""
    target = folder / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    try:
        outcome = run([str(python), "-c", PEERS[name], str(model), str(target / "model.onnx")], check=False)
        written = sum(file.stat().st_size for file in target.iterdir())
    finally:
        shutil.rmtree(target)
    result = {"model": "gemma3-270m", "tool": name, "seconds": outcome["seconds"], "peak_mb": outcome["peak_mb"],
              "bytes": written, "exit_code": outcome["exit_code"]}
    print(f"{'  ' + name:14} {result['seconds']:6.2f} s, {result['peak_mb']:5.0f} MB, wrote {written / 1e9:.2f} GB, "
          f"exit code {outcome['exit_code']}", flush=True)
    return result


def show(result: dict[str, Any]) -> None:
    """One line about ``result``."""
    print(f"{result['model']:14} {result['seconds']:6.2f} s, {result['peak_mb']:5.0f} MB, fired {result['fired']}; "
          f"cp {result['cp_seconds']:.2f} s: {result['times_cp']:.2f} times; "
          f"cp, synced {result['cp_synced_seconds']:.2f} s: {result['times_cp_synced']:.2f} times; "
          f"SHA-256 {result['sha256_seconds']:.2f} s; "
          f"{'ok' if result['ok'] else 'MISSED'}", flush=True)


def run(command: Sequence[str], check: bool = True) -> dict[str, Any]:
    """Wall seconds and peak memory of a process."""
    before = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - before
    process.returncode = os.waitstatus_to_exitcode(status)
    if check and process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": seconds, "peak_mb": peak_mb(usage), "output": output, "exit_code": process.returncode}


def peak_mb(usage: resource.struct_rusage) -> float:
    """``ru_maxrss``, which is in KB on Linux and in bytes on macOS, in MB."""
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def settle(files: Sequence[Path]) -> None:
    """Bring ``files`` into the page cache and everything else to the disk."""
    os.sync()
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            buffer = bytearray(16 << 20)
            while stream.readinto(buffer):
                pass


def check(before: Path, after: Path) -> None:
    """Weights that no pass touched must be the same bytes."""
    old, new = read_model(before), read_model(after)
    names = {tensor.name: values for tensor, values in held(old)}
    kept = [(names[tensor.name], values) for tensor, values in held(new) if tensor.name in names]
    assert kept
    for one, other in kept[::7]:
        assert one.digest() == other.digest()


def held(stored: Any) -> list[tuple[TensorProto, Values]]:
    """The large initializers of a model and their values."""
    return [(tensor, stored.values[tensor.external_data[0].value]) for tensor in stored.proto.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL]


def decoder(path: Path, layers: int, vocabulary: int, external: bool) -> None:
    """Write a Llama-like decoder, its weights tiles of random numbers that are made when they are written."""
    tile = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float16)
    values: dict[str, Values] = {}
    tensors: list[TensorProto] = []
    nodes = []

    def weight(name: str, *shape: int) -> str:
        number = len(values)

        def rows(start: int, stop: int) -> Any:
            return np.resize(np.roll(tile, 997 * number + start), (stop - start, *shape[1:]))

        made = ComputedValues(shape, TensorProto.FLOAT16, lambda: rows(0, shape[0]), rows)
        tensor, key = tensor_proto(name, made)
        assert key is not None
        values[key] = made
        tensors.append(tensor)
        return name

    def op(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{kind}_{len(nodes)}"], name=f"/{kind}_{len(nodes)}", **attributes))
        return nodes[-1].output[0]

    def twice(x: str, name: str) -> str:
        return op("Add", op("Add", x, weight(f"{name}.bias", D_MODEL)), weight(f"{name}.shift", D_MODEL))

    heads = helper.make_tensor("heads", TensorProto.INT64, [4], [0, 0, HEADS, D_MODEL // HEADS])
    flat = helper.make_tensor("flat", TensorProto.INT64, [3], [0, 0, D_MODEL])
    small = [heads, flat, helper.make_tensor("scale", TensorProto.FLOAT16, [], [np.float16((D_MODEL // HEADS) ** -0.5)])]
    x = op("Gather", weight("embedding", vocabulary, D_MODEL), "tokens")
    for layer in range(layers):
        name = f"layers.{layer}"
        normed = op("SimplifiedLayerNormalization", x, weight(f"{name}.norm1", D_MODEL), axis=-1, epsilon=1e-5)
        q, k, v = (op("Transpose", op("Reshape", twice(op("MatMul", normed, weight(f"{name}.{each}", D_MODEL, D_MODEL)),
                                                       f"{name}.{each}"), "heads"), perm=[0, 2, 1, 3]) for each in "qkv")
        scores = op("Softmax", op("Mul", op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2])), "scale"), axis=-1)
        mixed = op("Reshape", op("Transpose", op("MatMul", scores, v), perm=[0, 2, 1, 3]), "flat")
        x = op("Add", x, op("MatMul", mixed, weight(f"{name}.o", D_MODEL, D_MODEL)))
        normed = op("SimplifiedLayerNormalization", x, weight(f"{name}.norm2", D_MODEL), axis=-1, epsilon=1e-5)
        gate = op("MatMul", normed, weight(f"{name}.gate", D_MODEL, D_FF))
        gate = op("Mul", gate, op("Sigmoid", gate))
        hidden = op("Mul", gate, op("MatMul", normed, weight(f"{name}.up", D_MODEL, D_FF)))
        x = op("Add", x, op("MatMul", hidden, weight(f"{name}.down", D_FF, D_MODEL)))
    side = op("MatMul", op("MatMul", x, weight("project.0", D_MODEL, D_PROJECTED)), weight("project.1", D_PROJECTED, 512))
    head = op("MatMul", x, weight("head", D_MODEL, vocabulary))
    graph = helper.make_graph(
        nodes, "decoder", [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info(head, TensorProto.FLOAT16, ["batch", "length", vocabulary]),
         helper.make_tensor_value_info(side, TensorProto.FLOAT16, ["batch", "length", 512])], small + tensors)
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    write_model(model, values, path, external)


if __name__ == "__main__":
    sys.exit(main())
