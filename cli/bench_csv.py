"""The result of ``bench`` as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ..graph.errors import InputError
from ..runtime.bench import with_ratios

_TIMES = ("p50_ms", "p90_ms", "p99_ms", "load_ms", "bytes", "peak_bytes", "memcpy_nodes")
_RATIO = ("speedup", "low", "high")
_ROOFLINE = ("operations", "weight_bytes", "edge_bytes", "operations_per_byte", "bound_ms", "limit", "reached", "read_gbs")
_MACHINE = ("cpu", "cores", "gpu", "os", "onnxruntime", "ffnfold", "feeds", "rounds")


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each model at each point of the grid. The first model's speed-up is 1 without an interval."""
    found = []
    for each, ratio in with_ratios(result):
        threads = each.get("threads", result["machine"]["threads"])
        shape = " ".join(f"{name}={'x'.join(map(str, dims))}" for name, dims in each.get("shape", {}).items())
        row = {"model": each["model"], "provider": result["provider"], "threads": threads, "shape": shape,
               **{key: each[key] for key in _TIMES}, **{key: (ratio or {"speedup": 1.0}).get(key) for key in _RATIO},
               "nodes": " ".join(f"{name}={count}" for name, count in (each["nodes_by_provider"] or {}).items()),
               "fallback_nodes": len(each["fallback_nodes"] or ())}
        if "roofline" in each:
            row |= {key: each["roofline"][key] for key in _ROOFLINE}
        found.append({**row, **{key: result["machine"][key] for key in _MACHINE}})
    return found


def write_csv(result: dict[str, Any], path: Path) -> None:
    """Write the rows of ``result`` to ``path``.

    Raises:
        InputError: it cannot be written there.
    """
    table, text = rows(result), io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    try:
        path.write_text(text.getvalue(), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the table cannot be written ({error.strerror}): choose another place") from None
