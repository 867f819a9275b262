"""What ``verify --per-block`` needs, and whether it finds the culprit: one block of a rewritten model is damaged on purpose.

    python benchmarks/per_block.py /work/models/gemma3-270m [--block 7] [--json FILE]

The FFN blocks are rewritten by ``quantize-ffn``, but for one, whose down projection gets normal noise of half its own
size. Prints the blocks in the order ``verify`` ranks them, the peak of its resident memory (mapped pages count), and the
memory over the size of the model. Exit code 1 where the damaged block is not the first or the memory is above the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ffnfold
import numpy as np
from ffnfold.graph.store import read_model
from ffnfold.graph.weights import StoredValues

LIMIT = 1.5e9  # bytes over the model's own size


def damaged(model: Path, block: int, noise: float, folder: Path) -> Path:
    """``model`` with its FFNs in int8, that of ``block`` in float and wrong."""
    path = folder / "damaged.onnx"
    view = ffnfold.load(model)
    others = "+".join(str(each.index) for each in ffnfold.find_ffn_blocks(view) if each.index != block)
    ffnfold.optimize(view, [f"quantize-ffn:blocks={others}"])
    view.save(path, external=True)
    written = ffnfold.load(path)
    stored = ffnfold.find_ffn_blocks(written)[block].down.linear.source._values
    assert isinstance(stored, StoredValues)
    weight = stored.load()
    weight += (noise * weight.std() * np.random.default_rng(0).standard_normal(weight.shape)).astype(weight.dtype)
    with open(stored.source.path, "r+b") as file:
        file.seek(stored.offset)
        file.write(weight.tobytes())
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a sample model with its feeds (ffnfold models get)")
    parser.add_argument("--block", type=int, default=7)
    parser.add_argument("--noise", type=float, default=0.5, help="of the damage, relative to the weights")
    parser.add_argument("--feeds", type=int, default=4, help="how many of the reporting feeds (a block is run on each)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    reference = given.folder / "model.onnx"
    size = read_model(reference).nbytes
    with tempfile.TemporaryDirectory(prefix="ffnfold-") as place:
        candidate = damaged(reference, given.block, given.noise, Path(place))
        feeds = Path(place) / "feeds"
        feeds.mkdir()
        for feed in sorted((given.folder / "feeds" / "report").glob("*.npz"))[:given.feeds]:
            shutil.copy(feed, feeds)
        start = time.perf_counter()
        ran = subprocess.run([sys.executable, "-m", "ffnfold", "verify", str(reference), str(candidate), "--data",
                              str(feeds), "--per-block", "--threads", str(given.threads), "--json"],
                             capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    found = json.loads(ran.stdout)
    order = sorted(found["blocks"], key=lambda each: each["rank"])
    print(f"{'rank':>4} {'block':>5}  alone (rel. error)  chain")
    for each in order:
        alone, chain = (max(metrics["rel_l2"] for metrics in each[which].values()) for which in ("alone", "chain"))
        print(f"{each['rank']:>4} {each['block']:>5}  {alone:<18.6g}  {chain:.6g}")
    print(f"damaged block {given.block}, ranked {next(each['rank'] for each in order if each['block'] == given.block)}")
    print(f"model {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, {(peak - size) / 1e6:.0f} MB over its size, {seconds:.0f} s")
    result = {"model": str(reference), "bytes": size, "peak_bytes": peak, "over_bytes": peak - size, "seconds": seconds,
              "damaged": given.block, "order": [each["block"] for each in order], "verify": found}
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if order[0]["block"] == given.block and peak - size < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
