"""What a search finds against the best of all plans in a small space, on an NVIDIA GPU: a decoder of a real shape, float16.

    python benchmarks/search_exhaustive.py [--folder DIR] [--json FILE]      on the GPU; needs 10 GB of disk
    python benchmarks/search_exhaustive.py --tiny --provider cpu             the same on a small decoder, to see that it works

Makes the decoder (random weights, the layers of a Llama with 1.1 billion parameters; ``decoder.py`` beside this file says what
is in it), and searches it as ``ffnfold search`` does, for each limit on the cosine of the logits. Only then every plan of a
small space is built and measured: each block is kept, affine, or has half of its neurons and an affine map (``--narrow``: kept
or affine). The best of them for a limit is the fastest that keeps it on the same feeds by the same rule. Both winners and the
original are then raced in one run.

DIR keeps all measurements: a run that is cut off goes on from there. Exit code 1 if a search's speed-up is below 0.9 of the best.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from decoder import Shape, feed, write_decoder
from ffnfold.graph.model import Model
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, Variant, race
from ffnfold.search import SearchJob
from ffnfold.search.candidates import HEAD, KEEP, OTHERS, Candidate
from ffnfold.search.front import Expected
from ffnfold.search.goal import parse_goal
from ffnfold.search.run import Search

REAL = Shape(layers=4, d_model=2048, d_ff=5632, heads=32, vocabulary=32000)
TINY = Shape(layers=3, d_model=64, d_ff=176, heads=4, vocabulary=256, context=64)
LEAST = 0.9  # of the best speed-up
UNKNOWN = Expected((), math.nan)


def main() -> int:
    """Search, try everything, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small decoder")
    parser.add_argument("--cosine", type=float, nargs="+", default=[0.99, 0.95], metavar="X", help="the limits")
    parser.add_argument("--tokens", default="1x512", metavar="BATCHxTOKENS", help="the shape that has to be fast")
    parser.add_argument("--budget", type=float, default=4.0, metavar="MINUTES", help="of each search")
    parser.add_argument("--narrow", action="store_true", help="the small space has kept and affine blocks only")
    parser.add_argument("--folder", type=Path, help="where models and measurements go; kept. Default: a temporary folder")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "search_exhaustive.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as temporary:
        return compare(given, given.folder or Path(temporary))


def compare(given: argparse.Namespace, folder: Path) -> int:
    """Do it in ``folder``."""
    shape = dataclasses.replace(TINY, dtype="float32") if given.tiny and given.provider == "cpu" else TINY if given.tiny else REAL
    model = folder / "decoder.onnx"
    make(folder, model, shape, tuple(int(number) for number in given.tokens.split("x")))
    result: dict[str, Any] = {"decoder": dataclasses.asdict(shape), "provider": given.provider, "tokens": given.tokens,
                              "feeds": "synthetic", "limits": []}
    searches, reports = [], []
    for limit in given.cosine:
        job = SearchJob(model, folder / f"found-{limit:g}.onnx", folder / "feeds",
                        limits=[parse_goal(f"cosine_mean@logits={limit:g}")], target=given.provider, minutes=given.budget,
                        cache=folder / "cache", beside=False)
        start = time.perf_counter()
        search = Search(job, lambda message: print(f"  {message}", flush=True))
        reports.append(search.run())
        searches.append(search)
        print(f"search for {limit:g}: {reports[-1]['speedup']:.3f}×, {time.perf_counter() - start:.0f} s", flush=True)
    units = [unit for unit in searches[0].candidates if unit not in (OTHERS, HEAD)]
    several = [KEEP, Candidate(0), *([] if given.narrow else [Candidate(half(searches[0], units[0]))])]
    points = []
    for choice in itertools.product(several, repeat=len(units)):
        points.append(searches[0].measured(dict(zip(units, choice, strict=True)), UNKNOWN))
        print(f"{len(points)} of {len(several) ** len(units)}", flush=True)
    built = [point for point in points if math.isfinite(point.time)]
    for limit, search, report in zip(given.cosine, searches, reports, strict=True):
        best = search.problem.best(built, search.job)
        whole = Model.load(model)
        split = search.bench.split
        run_plan(whole, best.plan, fit=split.fit, choose=split.choose, provider=given.provider, fits=search.fits)
        raced = race([Variant(model, "original"), Variant(search.job.output, "search"), Variant(whole, "exhaustive")],
                     Feeds.of([dict(each) for each in search.traffic[0].feeds], synthetic=True), provider=given.provider,
                     seconds=6.0, allow_cpu=True)
        found, most = (ratio["speedup"] for ratio in raced["ratios"])
        chosen = next(point for point in report["front"] if point["chosen"])
        row = {"cosine": limit, "search": found, "exhaustive": most, "part": found / most,
               "search_choice": chosen["choice"], "search_cosine": chosen["drift"]["logits"]["cosine_mean"],
               "exhaustive_choice": {str(unit): str(each) for unit, each in best.choice.items()},
               "exhaustive_cosine": best.drift["logits"]["cosine_mean"], "exhaustive_plans": len(points), "built": len(built),
               "search_plans": len(report["points"]), "search_seconds": report["seconds"], "ratios": raced["ratios"]}
        result["machine"] = raced["machine"]
        result["limits"].append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "ratios"}, indent=1), flush=True)
    result["ok"] = all(row["part"] >= LEAST for row in result["limits"])
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    print("ok" if result["ok"] else f"MISSED: a search is below {LEAST:g} of the best")
    return 0 if result["ok"] else 1


def half(search: Search, unit: int) -> int:
    """Half of the neurons of a block, as the search rounds it."""
    d_ff = search.bench.workshop.blocks[unit].d_ff
    return min((each.neurons for each in search.bench.workshop.candidates()[unit] if each.neurons and not each.form),
               key=lambda width: abs(width - d_ff / 2))


def make(folder: Path, model: Path, shape: Shape, fast: tuple[int, ...]) -> None:
    """Write the decoder and random feeds: to fit, to choose and to report."""
    batch, length = (8, 16) if shape.layers == TINY.layers else (8, 512)
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_decoder(model, shape)
    enough = math.ceil(2.5 * (shape.d_model + shape.d_ff / 2) / (batch * length))
    sizes = {"fit": [(batch, length)] * enough, "choose": [(fast[0], min(fast[1], length))] * 16,
             "report": [(fast[0], min(fast[1], length))] * 8}
    for number, (part, shapes) in enumerate(sizes.items()):
        place = folder / "feeds" / part
        place.mkdir(parents=True, exist_ok=True)
        for index, (rows, tokens) in enumerate(shapes):
            np.savez(place / f"{index:04}.npz", **feed(shape, rows, tokens, seed=1000 * number + index))


if __name__ == "__main__":
    sys.exit(main())
