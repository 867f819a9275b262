"""Every model of a folder read, looked through for FFN blocks, and written without a rewrite: what comes out is what went in.

    python benchmarks/round_trip.py FOLDER [--json FILE]

Compared are the nodes in their order, functions, inputs, outputs, value_info, metadata and initializers of all graphs, weights
byte for byte, wherever they are stored. A file that cannot be read is counted apart. Exit code 1 if a file differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import onnx
from ffnfold.graph.errors import InputError
from ffnfold.graph.ffn import find_ffn_blocks
from ffnfold.graph.model import Model


def main() -> int:
    """Go through every file and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "round_trip.json")
    arguments = parser.parse_args()
    started = time.time()
    same, unread, different = 0, [], {}
    for path in sorted(arguments.folder.rglob("*.onnx")):
        try:
            found = differences(path)
        except InputError as error:
            unread.append(f"{path.name}: {error}")
            continue
        same += not found
        if found:
            different[path.name] = found
            print(f"DIFFERENT {path.name}: {', '.join(found)}", flush=True)
    report = {"same": same, "different": different, "unread": unread}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{same} files the same, {len(different)} different, {len(unread)} that cannot be read, {time.time() - started:.0f} s")
    return 1 if different else 0


def differences(path: Path) -> list[str]:
    """Names of the fields of model and graph that differ after reading and writing."""
    with tempfile.TemporaryDirectory() as folder:
        model = Model.load(path)
        if not model.proto.functions:  # where a block lies inside a function the search inlines it
            find_ffn_blocks(model)
        model.save(Path(folder) / "written.onnx")
        before, after = (_plain(onnx.load(each)) for each in (path, Path(folder) / "written.onnx"))
    return [field.name for one, other in ((before, after), (before.graph, after.graph)) for field in one.DESCRIPTOR.fields
            if field.name != "graph" and getattr(one, field.name) != getattr(other, field.name)]


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` without the word that a weight is not external, which some writers leave out."""
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")
    return model


if __name__ == "__main__":
    sys.exit(main())
