"""Mutated files: load, inspect, a save and the exact plan must end in an answer or in one line, within time and memory.

    python benchmarks/fuzz_load.py ZOO [--count 5000] [--seed 0] [--only NUMBER] [--keep DIR] [--json FILE]

ZOO is a folder of real exports; the small ones are mutated, half of them as protobuf messages (fields dropped, repeated,
moved, renumbered, numbers and lengths set to extremes, bytes flipped), half as models (names, dimensions, types, wiring,
attributes, external data, nesting). Each mutant is a number: the same number and seed give the same bytes, so that
``--only NUMBER`` does one again. They run in a worker process that may take 1 GB of memory and, for each, 10 seconds of the
processor (other work on the machine does not count then) and five minutes by the clock.

A mutant may also be stopped at the gate: it loads in ONNX Runtime, is broken nevertheless, and that shows once a pass has
made it simpler. Such are printed too, to be looked at: the command line says one line and writes nothing.

Exit code 1 if a mutant crashed or hung the worker, took too much memory, or raised anything but an InputError of one line.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

SECONDS, SECONDS_BY_THE_CLOCK, MEGABYTES, LARGEST_SEED = 10, 300, 1000, 300_000
NUMBERS = (0, 1, 2, 3, 7, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, -1, -2, -(1 << 31),
           -(1 << 63))
TEXTS = ("", " ", "x" * 5000, "../../etc/passwd", "/etc/passwd", "a\nb", "é\u2028", "main", "Add", "MatMul", "If", "0", "%s%n",
         "\0", "ai.onnx", "com.microsoft")


def main() -> int:
    """Mutate, run, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--folder", type=Path, help="where mutants are written; best one in memory, such as /dev/shm")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put the mutants that failed here")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "fuzz_load.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    seeds = [file for file in sorted(arguments.zoo.glob("*.onnx")) if file.stat().st_size <= LARGEST_SEED]
    numbers = range(arguments.count) if arguments.only is None else [arguments.only]
    counts: Counter[str] = Counter()
    worker = Worker()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        path = Path(name) / "m.onnx"
        for number in numbers:
            data, how = mutant(number, arguments.seed, seeds)
            path.write_bytes(data)
            verdict, why = worker.run(path)
            counts[verdict] += 1
            if verdict not in ("answered", "refused"):
                print(f"{number} ({how}): {verdict}: {why}", flush=True)
                if arguments.keep is not None:
                    arguments.keep.mkdir(exist_ok=True)
                    (arguments.keep / f"{number}.onnx").write_bytes(data)
    failed = sum(count for verdict, count in counts.items() if verdict not in ("answered", "refused", "stopped"))
    print(f"{sum(counts.values())} mutants of {len(seeds)} files: {counts['answered']} answered, {counts['refused']} refused "
          f"in one line, {counts['stopped']} stopped at the gate, {failed} failed; slowest {worker.slowest:.1f} s, "
          f"largest {worker.peak:.0f} MB")
    if arguments.only is None:
        arguments.json.parent.mkdir(exist_ok=True)
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "seeds": len(seeds), **counts, "failed": failed,
                                              "slowest_s": round(worker.slowest, 2), "peak_mb": round(worker.peak)}) + "\n")
    return 1 if failed else 0


class Worker:
    """A process that loads, inspects, saves and optimizes files; started again when one of them kills it."""

    def __init__(self) -> None:
        self.peak = self.slowest = 0.0
        self._process: subprocess.Popen[str] | None = None

    def run(self, path: Path) -> tuple[str, str]:
        """What became of ``path``: a verdict and what there is to say."""
        process = self._process
        if process is None:
            process = self._process = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE,
                                                       stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            process.stdout.readline()  # it is ready
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS_BY_THE_CLOCK + 5)
        line = process.stdout.readline() if ready else ""
        if not line:
            process.kill()
            self._process = None
            return ("HANG", f"more than {SECONDS_BY_THE_CLOCK} s") if not ready else ("CRASH", f"exit code {process.wait()}")
        result = json.loads(line)
        self.peak = max(self.peak, result["peak_mb"])
        self.slowest = max(self.slowest, result["seconds"])
        if result["peak_mb"] > MEGABYTES:
            process.kill()
            self._process = None
            return "MEMORY", f"{result['peak_mb']:.0f} MB; {result['verdict']}: {result['why']}"
        if result["seconds"] > SECONDS:
            return "HANG", f"{result['seconds']:.1f} s"
        return result["verdict"], result["why"]


def work() -> int:
    """Take paths from standard input; load, inspect, save, optimize and read again; say how it went, a line each."""
    import resource
    import traceback

    from ffnfold.graph.errors import BrokenByPass, InputError
    from ffnfold.graph.model import Model
    from ffnfold.graph.report import describe
    from ffnfold.graph.store import read_model
    from ffnfold.passes.optimize import Job, optimize_file
    from ffnfold.passes.plan import EXACT_PLAN, Plan

    answers = sys.stdout
    sys.stdout = sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        path = Path(line.rstrip("\n"))
        out = path.with_name("out.onnx")
        started = time.process_time()
        faulthandler.dump_traceback_later(SECONDS_BY_THE_CLOCK)
        verdict, why = "answered", ""
        try:
            json.dumps(describe(path))
            for external in (False, True):
                Model.load(path).save(out, external=external)
                read_model(out)
            json.dumps(optimize_file(Job(path, out, Plan.parse(EXACT_PLAN), verify=False)))
            read_model(out)
        except InputError as error:
            verdict, why = "refused", str(error)
            if len(why.splitlines()) != 1 or str(path) not in why:
                verdict = "NOT ONE LINE ABOUT THE FILE"
        except BrokenByPass as error:
            verdict, why = "stopped", str(error)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdict = "TRACEBACK"
            why = f"{type(error).__name__}: {str(error)[:200]} at {Path(where.filename).name}:{where.lineno}"
        faulthandler.cancel_dump_traceback_later()
        for file in path.parent.iterdir():
            if file != path:
                file.unlink()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(json.dumps({"verdict": verdict, "why": why, "seconds": time.process_time() - started, "peak_mb": peak}),
              file=answers, flush=True)
    return 0


def mutant(number: int, seed: int, seeds: list[Path]) -> tuple[bytes, str]:
    """The bytes of a mutant, and how it was made."""
    chance = random.Random(f"{seed}/{number}")
    source = chance.choice(seeds)
    data = source.read_bytes()
    change = mutate_message if number % 2 else mutate_model
    data, how = change(data, chance)
    return data, f"{source.name}: {how}"


# as protobuf messages


def mutate_message(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """``data`` with one to four fields, anywhere in the tree of messages, changed."""
    notes: list[str] = []
    for _ in range(chance.choice((1, 1, 2, 4))):
        data = _change_message(data, chance, notes, 0)
    if chance.random() < 0.1:
        data = data[:chance.randrange(len(data) + 1)]
        notes.append("cut off")
    return data, ", ".join(notes)


def _change_message(data: bytes, chance: random.Random, notes: list[str], depth: int) -> bytes:
    fields = _fields(data)
    if not fields:
        return _flip(data, chance, notes)
    index = chance.randrange(len(fields))
    if depth < 2:  # the whole model is one field of the top, and most nodes are alike
        index = max(range(len(fields)), key=lambda i: len(fields[i][2])) if chance.random() < 0.8 else index
    number, kind, content = fields[index]
    if kind == 2 and content and _fields(content) and chance.random() < (0.95 if depth < 2 else 0.6):
        fields[index] = (number, kind, _change_message(content, chance, notes, depth + 1))
        return _join(fields)
    action = chance.choice(("drop", "repeat", "move", "renumber", "number", "flip", "length", "empty", "text", "kind", "swap"))
    notes.append(f"{action} of field {number} at depth {depth}")
    if action == "drop":
        del fields[index]
    elif action == "repeat":
        fields[index:index] = [fields[index]] * chance.choice((1, 3, 50))
    elif action == "move":
        fields.insert(chance.randrange(len(fields)), fields.pop(index))
    elif action == "renumber":
        fields[index] = (chance.randrange(1, 30), kind, content)
    elif action == "number" and kind == 0:
        fields[index] = (number, kind, _varint(chance.choice(NUMBERS)))
    elif action == "length":
        before, after = _join(fields[:index]), _join(fields[index + 1:])
        length = chance.choice((0, 1, len(content) + 1, 1 << 31, 1 << 63))
        return before + _varint(number << 3 | 2) + _varint(length) + content + after
    elif action == "empty":
        fields[index] = (number, kind, b"\0" if kind == 0 else content[:0] if kind == 2 else content)
    elif action == "text" and kind == 2:
        fields[index] = (number, kind, chance.choice((b"\xff\xfe", b"\x00" * 9, chance.choice(TEXTS).encode(), b"\x80" * 20)))
    elif action == "kind":
        fields[index] = (number, chance.choice((0, 1, 2, 3, 4, 5, 6, 7)), content)
    elif action == "swap":
        other = chance.randrange(len(fields))
        fields[index], fields[other] = (number, *fields[other][1:]), (fields[other][0], kind, content)
    else:
        fields[index] = (number, kind, _flip(content, chance, notes))
    return _join(fields)


def _flip(data: bytes, chance: random.Random, notes: list[str]) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 8)) if changed else 0):
        changed[chance.randrange(min(len(changed), 4096))] ^= 1 << chance.randrange(8)
    notes.append("bits")
    return bytes(changed)


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Number, wire type and content of each field; nothing where ``data`` is no message."""
    fields = []
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        kind, start = tag & 7, position
        if tag >> 3 == 0 or position < 0:
            return []
        if kind == 0:
            _, position = _read_varint(data, position)
        elif kind == 2:
            length, start = _read_varint(data, position)
            position = start + length if start >= 0 else -1
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            return []
        if not 0 <= position <= len(data):
            return []
        fields.append((tag >> 3, kind, data[start:position]))
        if len(fields) > 20_000:
            return []
    return fields


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while 0 <= position < len(data) and shift < 64:
        value |= (data[position] & 127) << shift
        shift += 7
        position += 1
        if data[position - 1] < 128:
            return value, position
    return 0, -1


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _join(fields: list[tuple[int, int, bytes]]) -> bytes:
    return b"".join(_varint(number << 3 | kind) + (_varint(len(content)) if kind == 2 else b"") + content
                    for number, kind, content in fields)


# as models


def mutate_model(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """``data`` with one to six things changed that a model is made of."""
    model = onnx.ModelProto.FromString(data)
    notes = []
    for _ in range(chance.choice((1, 1, 2, 3, 6))):
        change = chance.choice(CHANGES)
        try:
            change(model, chance)
        except (IndexError, ValueError, TypeError):
            continue  # there is nothing of that kind, or protobuf does not take it
        notes.append(change.__name__.strip("_"))
    return model.SerializeToString(), ", ".join(notes)


def _graph(model: onnx.ModelProto, chance: random.Random) -> onnx.GraphProto:
    graph = model.graph
    while chance.random() < 0.7:
        inside = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        if not inside:
            break
        graph = chance.choice(inside)
    return graph


def _node(model: onnx.ModelProto, chance: random.Random) -> onnx.NodeProto:
    lists = [_graph(model, chance).node, *(function.node for function in model.functions)]
    return chance.choice(lists[0] if chance.random() < 0.8 else chance.choice(lists))


def _names(model: onnx.ModelProto) -> list[str]:
    return [name for node in model.graph.node for name in (*node.input, *node.output)] + list(TEXTS)


def _rewire(model: onnx.ModelProto, chance: random.Random) -> None:
    node = _node(model, chance)
    node.input[chance.randrange(len(node.input))] = chance.choice(_names(model))


def _rename_output(model: onnx.ModelProto, chance: random.Random) -> None:
    node = _node(model, chance)
    node.output[chance.randrange(len(node.output))] = chance.choice(_names(model))


def _drop_inputs(model: onnx.ModelProto, chance: random.Random) -> None:
    node = _node(model, chance)
    del node.input[chance.randrange(len(node.input)):]


def _more_inputs(model: onnx.ModelProto, chance: random.Random) -> None:
    _node(model, chance).input.extend(chance.choices(_names(model), k=chance.choice((1, 2, 1000))))


def _drop_outputs(model: onnx.ModelProto, chance: random.Random) -> None:
    del _node(model, chance).output[chance.randrange(2):]


def _more_outputs(model: onnx.ModelProto, chance: random.Random) -> None:
    _node(model, chance).output.extend(f"more {i}" for i in range(chance.choice((1, 3, 1000))))


def _operator(model: onnx.ModelProto, chance: random.Random) -> None:
    node = _node(model, chance)
    node.op_type = chance.choice(("MatMul", "Gemm", "Conv", "Reshape", "Transpose", "Split", "Slice", "Cast", "Identity",
                                  "Gather", "DequantizeLinear", "MatMulNBits", "FusedMatMul", "If", "Loop", "Scan", "Constant",
                                  "Squeeze",
                                  "Concat", "Pow", "LayerNormalization", "MatMulInteger", "MoE", "Expand", "Where", "Add",
                                  "BiasGelu", "ScatterND", *TEXTS))
    if chance.random() < 0.3:
        node.domain = chance.choice(("com.microsoft", "", "ai.onnx", "x"))


def _drop_node(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    del graph.node[chance.randrange(len(graph.node))]


def _repeat_node(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    graph.node.add().CopyFrom(chance.choice(graph.node))


def _shuffle(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    chance.shuffle(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def _attribute(model: onnx.ModelProto, chance: random.Random) -> None:
    nodes = [node for node in _graph(model, chance).node if node.attribute]
    attribute = chance.choice(chance.choice(nodes).attribute)
    action = chance.randrange(6)
    if action == 0:
        attribute.i = chance.choice(NUMBERS)
    elif action == 1:
        attribute.type = chance.randrange(15)
    elif action == 2:
        attribute.ints[:] = chance.choices(NUMBERS, k=chance.randrange(6))
    elif action == 3:
        attribute.name = chance.choice((*TEXTS, "axis", "axes", "perm", "transB", "value", "to", "K", "N"))
    elif action == 4:
        attribute.CopyFrom(helper.make_attribute(attribute.name, chance.choice((1.5, 7, "text", [1, 2], [0.5], float("nan")))))
    else:
        attribute.ref_attr_name = chance.choice(TEXTS)


def _drop_attribute(model: onnx.ModelProto, chance: random.Random) -> None:
    nodes = [node for node in _graph(model, chance).node if node.attribute]
    attributes = chance.choice(nodes).attribute
    del attributes[chance.randrange(len(attributes))]


def _tensor(model: onnx.ModelProto, chance: random.Random) -> onnx.TensorProto:
    graph = _graph(model, chance)
    inside = [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    return chance.choice([*graph.initializer, *inside] if chance.random() < 0.5 else inside or list(graph.initializer))


def _dimension(model: onnx.ModelProto, chance: random.Random) -> None:
    tensor = _tensor(model, chance)
    tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(NUMBERS)


def _dimensions(model: onnx.ModelProto, chance: random.Random) -> None:
    _tensor(model, chance).dims[:] = chance.choices(NUMBERS, k=chance.choice((0, 1, 2, 3, 5, 100)))


def _element_type(model: onnx.ModelProto, chance: random.Random) -> None:
    _tensor(model, chance).data_type = chance.choice((*range(30), -1, 1000))


def _numbers(model: onnx.ModelProto, chance: random.Random) -> None:
    tensor = _tensor(model, chance)
    tensor.raw_data = bytes(chance.getrandbits(8) for _ in range(len(tensor.raw_data)))[:5000]


def _fewer_numbers(model: onnx.ModelProto, chance: random.Random) -> None:
    tensor = _tensor(model, chance)
    tensor.raw_data = tensor.raw_data[:chance.randrange(len(tensor.raw_data))]


def _reshape(model: onnx.ModelProto, chance: random.Random) -> None:
    tensor = _tensor(model, chance)
    dims = list(tensor.dims)
    tensor.dims[:] = chance.choice(([*dims, 1], [1, *dims], dims[::-1], [1] * 40 + dims, [0, *dims]))
    if 0 in tensor.dims:
        tensor.raw_data = b""


def _outside(model: onnx.ModelProto, chance: random.Random) -> None:
    tensor = _tensor(model, chance)
    tensor.data_location = TensorProto.EXTERNAL
    places = ("m.onnx", "/etc/passwd", "../m.onnx", "", ".", "/dev/zero", "nowhere", "ffnfold:weight")
    for key, value in (("location", chance.choice(places)),
                       ("offset", str(chance.choice((*NUMBERS, "x")))), ("length", str(chance.choice((*NUMBERS, "1e9"))))):
        if chance.random() < 0.8:
            tensor.external_data.add(key=key, value=value)
    if chance.random() < 0.5:
        tensor.external_data.add(key="ffnfold:weight", value=chance.choice(("0", "1", "99999", "-1", "x")))
    if chance.random() < 0.5:
        tensor.ClearField("raw_data")


def _drop_initializer(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    del graph.initializer[chance.randrange(len(graph.initializer))]


def _rename_initializer(model: onnx.ModelProto, chance: random.Random) -> None:
    chance.choice(_graph(model, chance).initializer).name = chance.choice(_names(model))


def _initializer_is_input(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    tensor = chance.choice(graph.initializer)
    graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _input(model: onnx.ModelProto, chance: random.Random) -> None:
    info = chance.choice([*model.graph.input, *model.graph.output, *model.graph.value_info])
    action = chance.randrange(5)
    if action == 0:
        info.name = chance.choice(_names(model))
    elif action == 1:
        info.type.tensor_type.shape.dim[0].dim_value = chance.choice(NUMBERS)
    elif action == 2:
        info.type.tensor_type.elem_type = chance.choice((*range(30), -5))
    elif action == 3:
        info.ClearField("type")
    else:
        info.type.sequence_type.elem_type.tensor_type.elem_type = 1


def _output(model: onnx.ModelProto, chance: random.Random) -> None:
    model.graph.output.add().name = chance.choice(_names(model))


def _drop_outputs_of_graph(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = _graph(model, chance)
    del graph.output[:]


def _opset(model: onnx.ModelProto, chance: random.Random) -> None:
    if chance.random() < 0.3:
        del model.opset_import[:]
    else:
        chance.choice(model.opset_import).version = chance.choice(NUMBERS)


def _version(model: onnx.ModelProto, chance: random.Random) -> None:
    model.ir_version = chance.choice(NUMBERS)


def _nest(model: onnx.ModelProto, chance: random.Random) -> None:
    graph = helper.make_graph([], "innermost", [], [])
    for level in range(chance.choice((2, 10, 30))):
        empty = helper.make_graph([], "", [], [])
        node = helper.make_node("If", ["cond"], [f"out {level}"], then_branch=graph, else_branch=empty)
        graph = helper.make_graph([node], "nested", [], [])
    _graph(model, chance).node.extend(graph.node)


def _body(model: onnx.ModelProto, chance: random.Random) -> None:
    node = _node(model, chance)
    node.attribute.append(helper.make_attribute(chance.choice(("body", "then_branch", "x")), _copied(model.graph)))


def _copied(graph: onnx.GraphProto) -> onnx.GraphProto:
    copy = onnx.GraphProto()
    copy.CopyFrom(graph)
    del copy.initializer[:]
    return copy


def _function(model: onnx.ModelProto, chance: random.Random) -> None:
    node = _node(model, chance)
    function = model.functions.add(name=node.op_type, domain=chance.choice(("", "local")))
    function.input.extend(node.input)
    function.output.extend(node.output)
    function.node.add().CopyFrom(node)  # calls itself where the domain is the node's
    if chance.random() < 0.5:
        node.domain = "local"
        model.opset_import.add(domain="local", version=1)


def _metadata(model: onnx.ModelProto, chance: random.Random) -> None:
    model.metadata_props.add(key=chance.choice(TEXTS), value=chance.choice(TEXTS))


CHANGES: tuple[Callable[[onnx.ModelProto, random.Random], Any], ...] = (
    _rewire, _rename_output, _drop_inputs, _more_inputs, _drop_outputs, _more_outputs, _operator, _operator, _drop_node,
    _repeat_node, _shuffle, _attribute, _attribute, _attribute, _drop_attribute, _dimension, _dimensions, _element_type, _numbers,
    _fewer_numbers, _reshape, _outside, _outside, _drop_initializer, _rename_initializer, _initializer_is_input, _input, _input,
    _output, _drop_outputs_of_graph, _opset, _version, _nest, _body, _function, _metadata)


if __name__ == "__main__":
    sys.exit(main())
