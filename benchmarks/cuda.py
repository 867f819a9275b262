"""What the rewrites gain on an NVIDIA GPU: a decoder with the shapes of a 7B model, float16, as it is and rewritten.

    python benchmarks/cuda.py [--folder DIR] [--json FILE]           on the GPU; needs 20 GB of disk
    python benchmarks/cuda.py --tiny --provider cpu                  the same on a small decoder, to see that it works

Makes the decoder (random weights; ``decoder.py`` beside this file says what is in it), rewrites it by ``linearize-ffn`` on all
blocks (all but the first N with ``--keep-first N``; statistics are taken on the GPU), by weight-only int8 and by 4 bits on all
blocks, and races them with the original: 512 tokens, 8 × 512 tokens, and one token after 127 others, that one with and without
CUDA graphs in the same rounds. int8 is run as ONNX Runtime does by default and with ``ep.cuda.fpa_intb_gemm=1``, which packs the
weights for its faster kernels.

Prints a table and writes JSON, also after each race, so that a run that is cut off leaves what it had. Exit code 1 if a limit is
missed, a node that computes is on the CPU, or a copy between CPU and GPU was put in.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ffnfold
from decoder import Shape, feed, write_decoder
from ffnfold.passes.runner import run_plan
from ffnfold.runtime import Feeds, Session, Variant, compare, open_session, race
from ffnfold.runtime.placement import CPU

STEP = "1x1"
GRAPH = f"{STEP}, CUDA graph"
AFFINE, INT8, FOUR_BITS = "linearize-ffn", "int8", "4 bits"
SHAPES = {"llama-7b": Shape(),  # arXiv 2302.13971
          "mistral-7b": Shape(d_ff=14336, kv_heads=8),  # arXiv 2310.06825
          "qwen2-7b": Shape(d_model=3584, d_ff=18944, heads=28, kv_heads=4, vocabulary=152064)}  # arXiv 2407.10671
LIMITS = {(AFFINE, "1x512"): 1.7, (AFFINE, "8x512"): 1.8, (AFFINE, GRAPH): 1.6, (INT8, STEP): 1.3}
CONFIGS: dict[str, dict[str, str]] = {
    INT8: {}, f"{INT8}, packed": {"ep.cuda.fpa_intb_gemm": "1", "ep.cuda.fpa_intb_profile_m": "1,512,4096"}}
BATCH = 8  # sequences in a feed to fit on
TINY = Shape(layers=3, d_model=64, d_ff=176, heads=4, vocabulary=256, context=64)


def main() -> int:
    """Measure and print; exit code 1 if a limit is missed."""
    arguments = parse()
    shape = dataclasses.replace(TINY if arguments.tiny else dataclasses.replace(SHAPES[arguments.shape], layers=arguments.layers),
                                attention=arguments.attention, gated=not arguments.ungated)
    if arguments.ungated and not arguments.tiny:
        shape = dataclasses.replace(shape, d_ff=16384)
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as temporary:
        bench = Bench(arguments, shape, arguments.folder or Path(temporary))
        bench.make()
        bench.check()
        bench.race_all()
        return bench.finish()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small decoder; no limits")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-7b", help="of whose layers")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", choices=[AFFINE, INT8, FOUR_BITS], nargs="+", help="these rewrites (default: all)")
    parser.add_argument("--keep-first", type=int, default=0, metavar="N", help="leave the first N blocks as they are")
    parser.add_argument("--ungated", action="store_true", help="4096 → 16384, GELU, instead of 4096 → 11008 gated")
    parser.add_argument("--attention", choices=["fused", "plain"], default="fused")
    parser.add_argument("--int8", default="quantize-ffn:form=weight-only", metavar="PASS", help="the int8 pass with its options")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long a race lasts")
    parser.add_argument("--folder", type=Path, help="where the models go; kept. Default: a temporary folder")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "cuda.json")
    return parser.parse_args()


class Bench:
    """The models, and what was measured of them so far."""

    def __init__(self, arguments: argparse.Namespace, shape: Shape, folder: Path) -> None:
        self.arguments, self.shape, self.folder = arguments, shape, folder
        self.provider = arguments.provider
        self.length, self.past = (16, 15) if arguments.tiny else (512, 127)
        self.original = folder / "decoder.onnx"
        self.variants = [Variant(self.original, "original")]
        first = arguments.keep_first
        share = (shape.layers - first) / shape.layers
        kept = shape.ffn_parameters * shape.layers - (shape.layers - first) * (shape.ffn_parameters - shape.d_model ** 2)
        self.result: dict[str, Any] = {
            "decoder": dataclasses.asdict(shape), "provider": self.provider, "tiny": arguments.tiny,
            "past_of_1x1": self.past, "ffn_parameters_rewritten": share,
            "ffn_parameters_gone": 1 - kept / (shape.ffn_parameters * shape.layers),
            "plans": {name: plan for name, plan in (
                (AFFINE, f"linearize-ffn:blocks={first}-{shape.layers - 1}"), (INT8, arguments.int8),
                (FOUR_BITS, "quantize-ffn:form=nbits,bits=4")) if name in (arguments.only or [name])},
            "packages": {name: importlib.metadata.version(name) for name in ("numpy", "onnx", "onnx-graphsurgeon", "ffnfold")},
            "configs": CONFIGS, "seconds": {}, "passes": {}, "bytes": {}, "drift": {}, "executed": {}, "races": {}, "rows": [],
            "left_out": {}, "ok": False}

    def make(self) -> None:
        """Write the decoder and its rewrites."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.timed("write the decoder"):
            write_decoder(self.original, self.shape)
        count = math.ceil(1.5 * self.shape.d_model / (BATCH * self.length))
        feeds = Feeds.of([feed(self.shape, BATCH, self.length, seed=number) for number in range(count)], synthetic=True)
        for name, plan in self.result["plans"].items():
            path = self.folder / f"{name}.onnx"
            with self.timed(name):
                model = ffnfold.load(self.original)
                passes = run_plan(model, ffnfold.Plan.parse([plan]), fit=feeds, provider=self.provider,
                                  progress=lambda message: print(f"  {message}", flush=True))
                model.save(path)
            self.result["passes"][name] = [each.to_json() for each in passes]
            if not all(each.fired and not each.refused for each in passes):
                print(f"  {name}: {self.result['passes'][name]}", flush=True)
            configs = CONFIGS if name == INT8 and self.provider == "cuda" else {name: {}}
            self.variants += [Variant(path, title, config) for title, config in configs.items()]

    def check(self) -> None:
        """Leave out what does not run here, and measure the drift of the rest."""
        feeds = Feeds.of([feed(self.shape, 1, self.length, seed=999)], synthetic=True)
        step = feed(self.shape, 1, 1, self.past)
        for variant in list(self.variants):
            with self.timed(f"check {variant.title}"):
                try:
                    session = open_session(variant.source, provider=self.provider, config=variant.config, trace=True)
                    session.run(step, ["logits"])
                    self.result["executed"][variant.title] = executed(session)
                    if variant.title in self.result["plans"]:
                        drift = compare(self.original, variant.source, feeds, provider=self.provider, outputs=["logits"],
                                        logits=["logits"], allow_cpu=True)
                        self.result["drift"][variant.title] = drift.to_json()["outputs"]["logits"]
                except ffnfold.InputError as error:
                    self.result["left_out"][variant.title] = str(error)
                    self.variants.remove(variant)
                    print(f"  left out: {error}", flush=True)
            self.result["bytes"][variant.title] = variant.bytes

    def race_all(self) -> None:
        """Every shape."""
        for batch, tokens, past in ((1, self.length, 0), (8, self.length, 0), (1, 1, self.past)):
            name = f"{batch}x{tokens}"
            graph = name == STEP and self.provider == "cuda"
            feeds = Feeds.of([feed(self.shape, batch, tokens, past)], synthetic=True)
            with self.timed(f"race {name}"):
                found = race(self.variants, feeds, provider=self.provider, cuda_graph=graph, allow_cpu=True,
                             seconds=self.arguments.seconds)
            self.result["machine"] = found["machine"]
            self.result["races"][name] = found
            self.add_rows(GRAPH if graph else name, found, found["models"], found["ratios"])
            if graph:
                self.add_rows(STEP, found, [each["without_cuda_graph"] for each in found["models"]],
                              [each["without_cuda_graph"] for each in found["ratios"]])
            self.write()

    def add_rows(self, shape: str, found: dict[str, Any], times: list[dict[str, Any]], ratios: list[dict[str, Any]]) -> None:
        """Rows of the table."""
        for number, (model, time_of) in enumerate(zip(found["models"], times, strict=True)):
            ratio = ratios[number - 1] if number else {"speedup": 1.0, "low": 1.0, "high": 1.0}
            row = {"shape": shape, "model": model["model"], **{key: time_of[key] for key in ("p50_ms", "p90_ms", "p99_ms")},
                   **{key: ratio[key] for key in ("speedup", "low", "high")},
                   **{key: model[key] for key in ("nodes_by_provider", "memcpy_nodes")},
                   "fallback_nodes": len(model["fallback_nodes"])}
            self.result["rows"].append(row)
            print(f"  {shape:16} {row['model']:14} {row['p50_ms']:9.3f} ms  {row['speedup']:5.2f}× "
                  f"({row['low']:.2f} to {row['high']:.2f})", flush=True)

    def finish(self) -> int:
        """Print the table and what was missed."""
        missed = list(self.missed())
        self.result["missed"], self.result["ok"] = missed, not missed
        self.write()
        print(table(self.result["rows"]))
        for key, value in self.result["machine"].items():
            print(f"{key}: {value}")
        if AFFINE in self.result["plans"]:
            print(f"linearize-ffn: {self.result['ffn_parameters_rewritten']:.1%} of FFN parameters rewritten, "
                  f"{self.result['ffn_parameters_gone']:.1%} gone")
        for name, metrics in self.result["drift"].items():
            print(f"drift of {name} (random weights): cosine {metrics['cosine_mean']:.6f}, "
                  f"relative error {metrics['rel_l2']:.4f}")
        for name, count in self.result["executed"].items():
            print(f"{name} runs {', '.join(f'{number} {op}' for op, number in count.items())}")
        for text in missed:
            print(f"MISSED: {text}")
        return 1 if missed else 0

    def missed(self) -> Iterator[str]:
        """Each limit that was not kept; there are none for a small decoder or the CPU."""
        for name, reason in self.result["left_out"].items():
            if name in self.result["plans"]:
                yield f"{name} does not run: {reason}"
        if self.provider == "cpu":
            return
        for row in self.result["rows"]:
            if row["fallback_nodes"] or row["memcpy_nodes"]:
                yield (f"{row['model']} at {row['shape']}: {row['fallback_nodes']} nodes compute on the CPU, "
                       f"{row['memcpy_nodes']} copies")
        for (name, shape), least in ({} if self.arguments.tiny else LIMITS).items():
            if name not in self.result["plans"]:
                continue
            fastest = max((row["speedup"] for row in self.result["rows"]
                           if row["model"].startswith(name) and row["shape"] in ((STEP, GRAPH) if name == INT8 else (shape,))),
                          default=0.0)
            if fastest < least:
                yield f"{name} at {shape}: {fastest:.2f}×, should be at least {least:.2f}×"

    def write(self) -> None:
        """Write the JSON file as far as it goes."""
        self.arguments.json.parent.mkdir(parents=True, exist_ok=True)
        self.arguments.json.write_text(json.dumps(self.result, indent=1) + "\n")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Say what is done and how long it took."""
        print(f"{what} …", flush=True)
        start = time.perf_counter()
        yield
        self.result["seconds"][what] = round(time.perf_counter() - start, 1)
        print(f"  {self.result['seconds'][what]} s", flush=True)


def executed(session: Session) -> dict[str, int]:
    """How many nodes of each operator ran, most first; those on the CPU marked."""
    placement = session.placement()
    assert placement is not None
    stray = " on the CPU" if session.provider != "cpu" else ""
    count = Counter(f"{node.op}{stray if node.provider == CPU else ''}" for node in placement.nodes)
    return dict(count.most_common())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| tokens | model | p50 | p90 | speed-up (95 % interval) | at least | nodes | copies |", "| --- " * 8 + "|"]
    for row in rows:
        least = LIMITS.get((row["model"].split(",")[0], row["shape"]))
        nodes = ", ".join(f"{name.removesuffix('ExecutionProvider')} {count}"
                          for name, count in row["nodes_by_provider"].items())
        lines.append(f"| {row['shape']} | {row['model']} | {row['p50_ms']:.3f} ms | {row['p90_ms']:.3f} ms | "
                     f"{row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | "
                     f"{'' if least is None else f'{least:.1f}'} | {nodes} | {row['memcpy_nodes']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
