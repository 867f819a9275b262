"""``kill -9`` at random moments of a save: there must always be a whole model, the old one or the new one.

    python benchmarks/kill_save.py [--folder DIR] [--moments 200] [--megabytes 40] [--seed 0] [--json FILE]

Each time a process loads a model and saves it, and is killed at a moment drawn from the time that takes (two in three from
its last third, in which files get their names and old ones are removed). That time is estimated anew after each: longer
where the old model was still there, shorter where the save was done before, which does not count. Then the model is read by
the onnx package and compared, number for number, with the old one and the new one; and a second save, left alone, must leave
nothing in the folder but the model and its data file. Half of the saves go to the input itself, half elsewhere over an older
model; half have their weights inside, half in a data file, of which half have a name that some other tool gave it.

Exit code 1 if a model was lost or a file left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from ffnfold.graph.model import Model
from onnx import TensorProto, helper, numpy_helper

CASES = [(place, form) for place in ("itself", "elsewhere") for form in ("inside", "inside", "external", "other tool's")]


def main() -> int:
    """Kill, look, clean up; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "kill_save.json")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        sources = {form: make(folder / form.replace(" ", ""), arguments.megabytes, form) for form in {form for _, form in CASES}}
        seconds = {case: statistics.median(duration(*case, sources, folder / "run") for _ in range(5)) for case in set(CASES)}
        while (moment := sum(counts.values())) - counts["finished"] < arguments.moments:
            case = CASES[moment % len(CASES)]
            outcome = kill(*case, sources, folder / "run", seconds[case] * chance.uniform(0.7 if moment % 3 else 0, 1.05))
            counts[outcome] += 1
            seconds[case] *= {"old": 1.02, "finished": 0.95}.get(outcome, 1)
            if outcome not in ("old", "new", "finished"):
                print(f"moment {moment} ({case[0]}, {case[1]}): {outcome}")
    lost = sum(count for outcome, count in counts.items() if outcome not in ("old", "new", "finished"))
    print(f"{arguments.moments} saves killed: {counts['old']} left the old model, {counts['new']} the new one, "
          f"{counts['finished']} more were done before; {lost} lost a model or left a file behind")
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps({"moments": arguments.moments, "seed": arguments.seed, **counts, "lost": lost}) + "\n")
    return 1 if lost else 0


def make(folder: Path, megabytes: int, form: str) -> Path:
    """A model of random numbers in eight initializers."""
    folder.mkdir()
    random_numbers = np.random.default_rng(0)
    weights = [numpy_helper.from_array(random_numbers.standard_normal((megabytes << 17) // 4, np.float32), f"w{i}")
               for i in range(8)]
    graph = helper.make_graph([helper.make_node("Sum", [weight.name for weight in weights], ["y"])], "g", [],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights)
    settings = {"save_as_external_data": True, "location": "weights.bin"} if form == "other tool's" else {}
    onnx.save_model(helper.make_model(graph), folder / "m.onnx", **settings)
    if form == "external":
        wait(child(lambda: save(folder / "m.onnx", folder / "m.onnx", "old", True)))
    return folder / "m.onnx"


def save(source: Path, target: Path, mark: str, external: bool | None = None) -> None:
    """What is killed: the model of ``source`` with ``mark`` in its metadata goes to ``target``."""
    model = Model.load(source)
    model.metadata = lambda: {"mark": mark}
    model.save(target, external=external)


def prepare(place: str, form: str, sources: dict[str, Path], folder: Path) -> tuple[Path, Path]:
    """A fresh folder with the model to be saved, and the one to be written over."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in sources[form].parent.iterdir():
        shutil.copy(file, folder / file.name)
    return (folder / "m.onnx" if place == "itself" else sources[form]), folder / "m.onnx"


def duration(place: str, form: str, sources: dict[str, Path], folder: Path) -> float:
    """Seconds that a save takes when nobody kills it."""
    source, target = prepare(place, form, sources, folder)
    started = time.perf_counter()
    wait(child(lambda: save(source, target, "new")))
    return time.perf_counter() - started


def kill(place: str, form: str, sources: dict[str, Path], folder: Path, after: float) -> str:
    """Kill a save ``after`` seconds; returns which model is there, or what is wrong."""
    source, target = prepare(place, form, sources, folder)
    old = content(target)
    process = child(lambda: save(source, target, "new"))
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    killed = wait(process) == -signal.SIGKILL
    try:
        found = content(target)
    except Exception as error:
        return f"the model cannot be read: {error}"
    if found[0] != old[0] or (found[1] != old[1] and found[1] != "new"):
        return "the model is neither the old one nor the new one"
    if wait(child(lambda: save(target, target, "again"))) != 0:
        return "the next save failed"
    if content(target) != (old[0], "again"):
        return "the next save wrote something else"
    named = {entry.value for tensor in onnx.load(target, load_external_data=False).graph.initializer
             for entry in tensor.external_data if entry.key == "location"}
    left = {file.name for file in folder.iterdir()} - named - {"m.onnx"}
    if left:
        return f"left behind: {', '.join(sorted(left))}"
    return ("new" if found[1] == "new" else "old") if killed else "finished"


def content(path: Path) -> tuple[str, str]:
    """Hash of all numbers, and the mark."""
    model = onnx.load(path)
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.name.encode() + tensor.raw_data)
    return digest.hexdigest(), next((entry.value for entry in model.metadata_props if entry.key == "mark"), "")


def child(job: Callable[[], None]) -> int:
    """Run ``job`` in a process of its own. This process never starts a thread, so it may fork."""
    process = os.fork()
    if process:
        return process
    try:
        job()
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)


def wait(process: int) -> int:
    """Exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
