"""Coverage-guided fuzzing of load and inspect (https://github.com/google/atheris): no crash, no hang, no traceback.

    python benchmarks/fuzz_atheris.py ZOO [--minutes 10] [--seed 1] [--folder DIR] [--json FILE]

The interpreter must have atheris and ffnfold. It starts from the smallest files of ZOO, a folder of real exports, and from
small graphs made here; half of the mutations are those of fuzz_load.py, which keep a file a model, half are libFuzzer's own.
Each input may take 10 seconds, the process 1 GB.

Exit code 1 if it found something: the input is then in DIR, as crash-…, timeout-… or oom-….
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LARGEST_SEED, SEEDS, LONGEST = 60_000, 40, 1 << 18


def main() -> int:
    """Fuzz in a process of its own, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("fuzz"), help="where inputs of interest and findings go")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "fuzz_atheris.json")
    arguments = parser.parse_args()
    corpus = arguments.folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    plant(arguments.zoo, corpus)
    command = [sys.executable, __file__, "--worker", str(corpus), f"-max_total_time={round(arguments.minutes * 60)}",
               f"-seed={arguments.seed}", f"-artifact_prefix={arguments.folder}/", "-timeout=10", "-rss_limit_mb=1000",
               f"-max_len={LONGEST}", "-print_final_stats=1", "-len_control=0"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    numbers = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    covered = re.findall(r"cov: (\d+)", done.stderr)
    found = sorted(file.name for file in arguments.folder.iterdir() if re.match("(crash|timeout|oom|leak)-", file.name))
    result = {"minutes": arguments.minutes, "seed": arguments.seed, "runs": numbers.get("number_of_executed_units", 0),
              "slowest_s": numbers.get("slowest_unit_time_sec"), "peak_mb": numbers.get("peak_rss_mb"),
              "covered": int(covered[-1]) if covered else 0, "found": found}
    print(f"{result['runs']} inputs in {arguments.minutes:g} minutes, {result['covered']} places covered, slowest "
          f"{result['slowest_s']} s, peak {result['peak_mb']} MB, found {len(found)}")
    if done.returncode or found:
        print(done.stderr[-3000:], file=sys.stderr)
        return 1
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(result) + "\n")
    return 0


def plant(zoo: Path, corpus: Path) -> None:
    """Put the inputs to begin with into ``corpus``."""
    small = [file for file in zoo.glob("*.onnx") if file.stat().st_size <= LARGEST_SEED]
    for file in sorted(small, key=lambda file: file.stat().st_size)[:SEEDS]:
        (corpus / file.name).write_bytes(file.read_bytes())
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    def graph(activation: str, width: int) -> bytes:
        numbers = np.random.default_rng(width)
        weights = [numpy_helper.from_array(numbers.standard_normal(shape).astype(np.float32), name)
                   for name, shape in (("scale", (8,)), ("up", (8, width)), ("bias", (width,)), ("down", (width, 8)))]
        nodes = [helper.make_node("LayerNormalization", ["x", "scale"], ["n"], axis=-1),
                 helper.make_node("MatMul", ["n", "up"], ["u"]), helper.make_node("Add", ["u", "bias"], ["z"]),
                 helper.make_node(activation, ["z"], ["h"]),
                 helper.make_node("MatMul", ["h", "down"], ["d"]), helper.make_node("Add", ["x", "d"], ["y"])]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 8]) for name in "xy"]
        return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], weights)).SerializeToString()

    for activation in ("Relu", "Sigmoid", "Tanh", "Gelu"):
        for width in (16, 64):
            (corpus / f"made_{activation}_{width}.onnx").write_bytes(graph(activation, width))


def work() -> None:
    """What libFuzzer calls."""
    import atheris

    sys.argv.remove("--worker")
    with atheris.instrument_imports(include=["ffnfold"]):
        from ffnfold.graph.errors import InputError
        from ffnfold.graph.model import Model
        from ffnfold.graph.report import describe
    from fuzz_load import mutate_message, mutate_model

    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    path = Path(folder.name) / "m.onnx"

    def test(data: bytes) -> None:
        path.write_bytes(data)
        try:
            json.dumps(describe(path))
            Model.load(path).to_proto()
        except InputError as error:
            text = str(error)
            if len(text.splitlines()) != 1 or not text.startswith(str(path)):
                raise AssertionError(f"no line about the file: {text[:300]}") from None

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            try:
                changed = (mutate_message if chance.random() < 0.5 else mutate_model)(bytes(data), chance)[0]
            except Exception:  # no model to be changed as one
                changed = b""
            if 0 < len(changed) <= limit:
                return changed
        return atheris.Mutate(bytes(data), limit)

    atheris.Setup(sys.argv, test, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work()
    else:
        sys.exit(main())
