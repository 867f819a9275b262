"""The exact plan on every case of onnx.backend.test: ONNX Runtime must give the same before and after.

    python benchmarks/exact_onnx_backend.py [--only TEXT] [--json FILE]

Takes the node cases of ``onnx.backend.test.case.node.collect_testcases`` and the models in the package's data folder.
In these the weights are inputs that the caller gives, or may override, so that hardly a pass finds anything to do; so each
is run a second time, frozen: every tensor but the first is made a constant, and no constant can be overridden.

Each runs in a process of its own kind (one worker, started again when a case kills it). A case counts as

    compared   ONNX Runtime ran it twice alike before, and its outputs after are within 1e-5 (type and shape too)
    refused    ONNX Runtime refuses it before and after
    left out   two runs before differ (random numbers)
    unread     ffnfold refuses the file in one line (it leaves as it came)
    WRONG      anything else: outputs that moved, another verdict, a crash, a hang; a graph that is not what it was though no pass
               fired

Exit code 1 if any is WRONG.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

TOLERANCE = 1e-5
SECONDS = 180
FROZEN = ", frozen"
UNHELD = ("test_if_opt", "test_loop16_seq_none")


def main() -> int:
    """Run every case and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "exact_onnx_backend.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work()
    started = time.time()
    results = list(run_all(arguments.only))
    wrong = [result for result in results if result["verdict"] == "WRONG"]
    for result in wrong:
        print(f"WRONG {result['name']}: {result['why']}")
    for result in results:
        if result["verdict"] == "unread":
            print(f"unread {result['name']}: {result['why']}")
        elif result["name"] in UNHELD and result["verdict"] == "compared":
            print(f"{result['name']}, which onnx-graphsurgeon cannot hold: " + (
                "left as it came" if result["untouched"] else "rewritten"))
    parts = {"cases": [result for result in results if not result["name"].endswith(FROZEN)],
             "frozen": [result for result in results if result["name"].endswith(FROZEN)]}
    summaries = {part: summary(some) for part, some in parts.items() if some}
    for part, counts in summaries.items():
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts["verdicts"].items()))
        print(f"{part}: {counts['number']} ({counts['files']} of them files): {verdicts}")
        print(f"  changed: {counts['changed']}; largest difference {counts['largest_difference']:.2e}")
        print("  fired on: " + ", ".join(f"{name} {count}" for name, count in counts["fired"].items()))
    print(f"{time.time() - started:.0f} s")
    if not arguments.only:
        report = {**summaries, "tolerance": TOLERANCE, "wrong": wrong,
                  "left_out": [r["name"] for r in results if r["verdict"] == "left out"],
                  "unread": [{"name": r["name"], "why": r["why"]} for r in results if r["verdict"] == "unread"]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over some cases; how many each pass of the plan fired on."""
    names = list(dict.fromkeys(name for result in results for name in result.get("fired", {})))
    return {"number": len(results), "files": sum(".onnx" in result["name"] for result in results),
            "verdicts": dict(Counter(result["verdict"] for result in results)),
            "changed": sum(any(result.get("fired", {}).values()) for result in results),
            "fired": {name: sum(bool(result.get("fired", {}).get(name)) for result in results) for name in names},
            "largest_difference": max(result.get("difference", 0.0) for result in results)}


def run_all(only: str) -> Iterator[dict[str, Any]]:
    """The result of every case, from a worker that is started again when it dies or hangs."""
    number, worker = 0, None
    while True:
        if worker is None:
            worker = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, text=True, bufsize=1)
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps({"number": number, "only": only}) + "\n")
        ready = select.select([worker.stdout], [], [], SECONDS)[0]
        line = worker.stdout.readline() if ready else ""
        if not line:
            worker.kill()
            why = f"killed the process (exit {worker.wait()})" if ready else f"ran longer than {SECONDS} s"
            yield {"name": f"case {number}", "verdict": "WRONG", "why": why}
            worker = None
        else:
            result = json.loads(line)
            if result is None:
                worker.kill()
                worker.wait()
                return
            if result:
                yield result
        number += 1


def work() -> int:
    """Answer requests for cases, one line each: {} for one not asked for, null behind the last."""
    warnings.simplefilter("ignore")
    cases = collect()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] | None = None
        if request["number"] < len(cases):
            name, case = cases[request["number"]]
            answer = {"name": name, **judge(case)} if request["only"] in name else {}
        print(json.dumps(answer), flush=True)
    return 0


def collect() -> list[tuple[str, Any]]:
    """Name and case; a case is what onnx made, or a model file. Behind them all again, frozen, where that makes a difference."""
    import onnx.backend.test
    from onnx.backend.test.case.node import collect_testcases

    cases: list[tuple[str, Any]] = [(case.name, case) for case in collect_testcases(None)]
    folder = Path(onnx.backend.test.__file__).parent / "data"
    cases += [(str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*.onnx"))]
    return cases + [(f"{name}{FROZEN}", Frozen(case)) for name, case in cases if can_be_frozen(case)]


@dataclass(frozen=True)
class Frozen:
    """A case whose tensors but the first are made constants."""

    case: Any


def can_be_frozen(case: Any) -> bool:
    """Whether there is anything to freeze: a second tensor among the inputs, or an initializer that is an input."""
    if isinstance(case, Path):
        graph = onnx.load_model(case, load_external_data=False).graph
        return bool({info.name for info in graph.input} & {tensor.name for tensor in graph.initializer})
    return len(case.data_sets) == 1 and any(_is_tensor(value) for value in case.data_sets[0][0][1:])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic, onnx.TensorProto)) and (
        isinstance(value, onnx.TensorProto) or np.asarray(value).dtype != object)


def freeze(case: Any, path: Path) -> list[dict[str, Any]] | None:
    """Write the frozen model to ``path``. Returns its inputs; None where the case is a file, which has them beside it."""
    model = onnx.ModelProto()
    model.CopyFrom(onnx.load(case) if isinstance(case, Path) else case.model)
    feed: dict[str, Any] | None = None
    if not isinstance(case, Path):
        given = dict(zip([info.name for info in model.graph.input], case.data_sets[0][0], strict=False))
        fixed = [name for name in list(given)[1:] if _is_tensor(given[name])]
        for name in fixed:
            value = given.pop(name)
            tensor = value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(value))
            model.graph.initializer.append(tensor)
            model.graph.initializer[-1].name = name
        feed = {name: _array(value) for name, value in given.items()}
    constant = {tensor.name for tensor in model.graph.initializer}
    kept = [info for info in model.graph.input if info.name not in constant]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)
    onnx.save_model(model, path)
    return None if feed is None else [feed]


def judge(case: Any) -> dict[str, Any]:
    """The verdict on one case."""
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        feeds = None
        if isinstance(case, Frozen):
            feeds = freeze(case.case, before)
            case = case.case
        elif isinstance(case, Path):
            before = case
        else:
            onnx.save_model(case.model, before)
        try:
            return _judge(before, after, case, feeds)
        except Exception as error:
            return {"verdict": "WRONG", "why": f"{type(error).__name__}: {error}"[:500]}


def _judge(before: Path, after: Path, case: Any, feeds: list[dict[str, Any]] | None) -> dict[str, Any]:
    from ffnfold.graph.errors import InputError
    from ffnfold.graph.model import Model
    from ffnfold.passes.plan import EXACT_PLAN, Plan
    from ffnfold.passes.runner import run_plan
    from ffnfold.runtime.agreement import disagreement, largest_difference

    try:
        model = Model.load(before)
    except InputError as error:
        return {"verdict": "unread", "why": str(error)}
    results = run_plan(model, Plan.parse(EXACT_PLAN), threads=1)
    fired = {result.name: result.fired for result in results}
    feeds = feeds or _feeds(before, case)
    model.save(after)
    untouched = _graph(before) == _graph(after)
    if not any(fired.values()) and not untouched:
        return {"verdict": "WRONG", "why": "no pass fired and the graph is another", "fired": fired}
    first, second, rewritten = (_outputs(path, feeds) for path in (before, before, after))
    if isinstance(first, str):
        same = isinstance(rewritten, str)
        return {"verdict": "refused" if same else "WRONG", "why": first if same else f"ran only after: {first}", "fired": fired}
    if isinstance(rewritten, str):
        return {"verdict": "WRONG", "why": f"does not run after: {rewritten}", "fired": fired}
    assert not isinstance(second, str)
    largest = 0.0
    for once, again, now in zip(first, second, rewritten, strict=True):
        if disagreement(once, again) is not None or largest_difference(once, again) > 0:
            return {"verdict": "left out", "fired": fired}
        reason = disagreement(once, now)
        if reason is not None:
            return {"verdict": "WRONG", "why": reason, "fired": fired}
        largest = max(largest, largest_difference(once, now))
    if largest > TOLERANCE:
        return {"verdict": "WRONG", "why": f"outputs moved by {largest:.2e}", "fired": fired}
    return {"verdict": "compared", "difference": largest, "fired": fired, "untouched": untouched}


def _graph(path: Path) -> bytes:
    return bytes(onnx.load_model(path, load_external_data=False).graph.SerializeToString(deterministic=True))


def _feeds(path: Path, case: Any) -> list[dict[str, Any]] | None:
    """The inputs of a case; None where ONNX Runtime would have to be asked and refuses the model."""
    from ffnfold.graph.errors import InputError
    from ffnfold.graph.model import Model
    from ffnfold.runtime import load_feeds, synthetic_feeds
    from ffnfold.runtime.onnx_data import data_set_folders
    from ffnfold.runtime.specs import input_specs

    if not isinstance(case, Path):
        names = [info.name for info in case.model.graph.input]
        return [dict(zip(names, map(_array, inputs), strict=False)) for inputs, _ in case.data_sets]
    specs = input_specs(Model.load(path))
    if data_set_folders(case.parent):
        return list(load_feeds(case.parent, specs))
    try:
        return list(synthetic_feeds([spec for spec in specs if not spec.optional], count=1))
    except InputError:
        return None


def _array(value: Any) -> Any:
    """A test input as a session takes it: no NumPy scalars, no protos."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _outputs(path: Path, feeds: list[dict[str, Any]] | None) -> list[dict[str, Any]] | str:
    """What ONNX Runtime gives on every feed, or its complaint."""
    from ffnfold.graph.errors import InputError
    from ffnfold.runtime import open_session

    if feeds is None:
        return "its inputs cannot be made up"
    try:
        session = open_session(path, threads=1)
        return [session.run(feed) for feed in feeds]
    except InputError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
