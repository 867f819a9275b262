"""Reports with every part a page can have, in names that would break it if they were let through."""

from __future__ import annotations

from typing import Any

import numpy as np
from ffnfold.cli.page import Report

METRICS = {"max_abs": 0.5, "mean_abs": 0.01, "rel_l2": 0.02, "sqnr_db": 34.0, "cosine_mean": 0.9998, "cosine_p5": 0.999,
           "cosine_min": 0.99, "kl_mean": None, "top1": None, "top5": None, "nonfinite": 0}
ODD = "<script>alert('$x_1$')</script> & /layer.0/$\\frac{1}{2}$"


def metrics(size: float | None) -> dict[str, Any]:
    return {**METRICS, "rel_l2": size}


def drift(kind: str = "real") -> dict[str, Any]:
    sizes = [0.02, 0.5, 0.01, None]
    blocks = [{"block": number, "name": ODD if number == 1 else f"/layer.{number}/ffn", "value": "v", **metrics(0.01),
               "alone": {"y": metrics(size)}, "chain": {"y": metrics(size and size * 1.5)}, "added": {"y": size},
               "rank": rank} for number, (size, rank) in enumerate(zip(sizes, (3, 2, 4, 1), strict=True))]
    blocks.append({"block": 4, "name": "/inside", "value": None, "reason": "it is inside the subgraph main/If", "rank": None})
    return {"provider": "cpu", "feeds": kind, "samples": 12, "ok": True, "outputs": {"y": metrics(0.02), ODD: metrics(None)},
            "block_samples": 4, "blocks": blocks}


def timing(kind: str = "synthetic") -> dict[str, Any]:
    """Two models at two shapes, the second twice as fast."""
    random = np.random.default_rng(0)
    models, ratios = [], []
    for tokens in (16, 128):
        place = {"shape": {"x": [1, tokens]}, "threads": None}
        models += [_row(f"models/{name}.onnx", 10 / divisor + random.gamma(2, 0.4, 60), divisor) | place
                   for divisor, name in ((1, "original"), (2, "optimized"))]
        ratios.append({"model": "models/optimized.onnx", "speedup": 1.9, "low": 1.8, "high": 2.0, **place})
    return {"machine": {"cpu": "a processor", "cores": 2, "feeds": kind, "rounds": 60, "cuda_graph": False, "threads": None},
            "provider": "cuda", "models": models, "ratios": ratios}


def _row(name: str, times: np.ndarray, divisor: int) -> dict[str, Any]:
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    roofline = {"operations": 10 ** 9, "operations_by_type": {"float32": 10 ** 9}, "weight_bytes": 10 ** 7, "edge_bytes": 0,
                "operations_per_byte": 100.0 / divisor, "bound_ms": 5.0, "limit": "compute", "reached": 0.4,
                "matmul_gops": {"float32": 200.0, "int8": 800.0}, "read_gbs": 10.0}
    return {"model": name, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "load_ms": 20.0, "bytes": 10 ** 8 // divisor,
            "peak_bytes": 10 ** 8, "nodes_by_provider": {"CPUExecutionProvider": 9, "CUDAExecutionProvider": 90},
            "memcpy_nodes": 2, "fallback_nodes": [{"name": ODD, "op": "MatMulInteger"}], "times_ms": times.tolist(),
            "roofline": roofline}


def full(kind: str = "real") -> Report:
    """Everything."""
    return Report(
        f"optimized.onnx {ODD}", ok=False, summary=[("made from", ODD)], plan="- quantize-ffn:\n    blocks: 0+3-5\n",
        passes=[{"name": "quantize-ffn", "exact": False, "fired": 3, "refused": [{"block": 1, "reason": ODD}], "seconds": 0.5}],
        drift=drift(kind), timing=timing(kind), bytes={"models/original.onnx": 10 ** 8, "models/optimized.onnx": 4 * 10 ** 7},
        equivalence={"passes": ["clean-up"], "nodes": {"before": 10, "after": 9}, "executed": {"before": 8, "after": 8},
                     "operators": {}, "differences": {"given": 1e-7, "zeros": None, "large": "NaN in other places"}},
        front=[{"plan": [{"quantize-ffn": {"blocks": "0"}}, "fold-norm"], "drift": 0.01 * number, "speedup": 1 + 0.2 * number,
                "bytes": 10 ** 8 - number * 10 ** 7} for number in (3, 1, 2)],
        drift_metric="rel_l2 of y", feeds=kind, notes=["synthetic feeds: a note"], missed=[f"a limit was missed: {ODD}"])
