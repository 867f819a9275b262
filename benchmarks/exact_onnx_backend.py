"""The exact plan on every case of onnx.backend.test: ONNX Runtime must give the same before and after.

    python benchmarks/exact_onnx_backend.py [--only TEXT] [--json FILE]

Takes the node cases of ``onnx.backend.test.case.node.collect_testcases`` and the models in the package's data folder.
Each runs in a process of its own kind (one worker, started again when a case kills it). A case counts as

    compared   ONNX Runtime ran it twice alike before, and its outputs after are within 1e-5 (type and shape too)
    refused    ONNX Runtime refuses it before and after
    left out   two runs before differ (random numbers)
    unread     ffnfold refuses the file in one line (it leaves as it came)
    WRONG      anything else: outputs that moved, another verdict, a crash, a hang

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
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

TOLERANCE = 1e-5
SECONDS = 180


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
    counts = Counter(result["verdict"] for result in results)
    fired = Counter(name for result in results for name, count in result.get("fired", {}).items() if count)
    changed = sum(any(result.get("fired", {}).values()) for result in results)
    wrong = [result for result in results if result["verdict"] == "WRONG"]
    for result in wrong:
        print(f"WRONG {result['name']}: {result['why']}")
    for result in results:
        if result["verdict"] == "unread":
            print(f"unread {result['name']}: {result['why']}")
    print(f"{len(results)} cases: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    print(f"changed: {changed}; largest difference {max(result.get('difference', 0.0) for result in results):.2e}")
    print("fired on: " + ", ".join(f"{name} {count}" for name, count in sorted(fired.items())))
    print(f"{time.time() - started:.0f} s")
    if not arguments.only:
        report = {"cases": len(results), "verdicts": counts, "changed": changed, "fired": fired,
                  "largest_difference": max(result.get("difference", 0.0) for result in results), "tolerance": TOLERANCE,
                  "wrong": wrong, "left_out": [r["name"] for r in results if r["verdict"] == "left out"],
                  "unread": [{"name": r["name"], "why": r["why"]} for r in results if r["verdict"] == "unread"]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong else 0


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
    """Name and case; a case is what onnx made, or a model file."""
    import onnx.backend.test
    from onnx.backend.test.case.node import collect_testcases

    cases: list[tuple[str, Any]] = [(case.name, case) for case in collect_testcases(None)]
    folder = Path(onnx.backend.test.__file__).parent / "data"
    return cases + [(str(path.relative_to(folder)), path) for path in sorted(folder.rglob("*.onnx"))]


def judge(case: Any) -> dict[str, Any]:
    """The verdict on one case."""
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        if isinstance(case, Path):
            before = case
        else:
            onnx.save_model(case.model, before)
        try:
            return _judge(before, after, case)
        except Exception as error:
            return {"verdict": "WRONG", "why": f"{type(error).__name__}: {error}"[:500]}


def _judge(before: Path, after: Path, case: Any) -> dict[str, Any]:
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
    feeds = _feeds(before, case)
    model.save(after)
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
    return {"verdict": "compared", "difference": largest, "fired": fired}


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
    if data_set_folders(path.parent):
        return list(load_feeds(path.parent, specs))
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
