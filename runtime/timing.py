"""Timing: models raced against each other in one process, their runs interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from ..graph.errors import InputError
from .entrant import Entrant, Variant
from .feeds import Feeds
from .machine import machine
from .onnx_runtime import onnx_runtime, providers, session_options
from .sessions import Source
from .specs import Array

_MOST_FEEDS = 8  # bound to the device all at once
_RESAMPLES = 2000


def race(sources: Sequence[Source | Variant], feeds: Feeds, *, provider: str = "cpu", threads: int | None = None,
         cuda_graph: bool = False, use_tf32: bool = False, allow_cpu: bool = False, seconds: float = 10.0,
         min_rounds: int = 15, max_rounds: int = 2000, keep_times: bool = False,
         progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Time models against the first of them.

    All are opened and warmed up first. Each round takes one feed and runs every model on it once, in an order drawn anew,
    so that whatever slows the machine down slows all of them. On CUDA inputs and outputs stay on the device and the clock
    stops when it is done.

    Args:
        feeds: the first eight are used, in turn.
        cuda_graph: replay a captured CUDA graph (every node that computes on CUDA, no If or Loop), and run without one in
            the same rounds.
        use_tf32: whether CUDA may round float32 operands of MatMul to TF32.
        allow_cpu: accept nodes that compute on the CPU though CUDA was asked for.
        seconds: how long to go on, all models together; at least ``min_rounds``, at most ``max_rounds`` rounds.
        keep_times: each entry of ``models`` has ``times_ms`` too, one a round.
        progress: called now and then with the rounds done and the rounds there will be, as far as is known.

    Returns:
        ``bench``'s object; ``machine`` also says under which conditions it was measured. ``speedup`` is the median over
        rounds of the first model's time / this model's time in the same round; ``low`` and ``high`` bound its 95 %
        interval (percentile bootstrap over rounds, fixed seed). With ``cuda_graph`` these are about the graph, and
        ``without_cuda_graph`` beside them holds the same of the runs without one. ``peak_bytes`` is how far the process's
        resident memory rose at most while the model was loaded and warmed up (null where the system does not tell); the
        memory of a GPU is not in it. ``memcpy_nodes`` are copies between CPU and device that ONNX Runtime put in,
        ``fallback_nodes`` what computes on the CPU.

    Raises:
        InputError: no models or feeds, a model does not load or run, a CUDA graph is asked for without CUDA, or nodes that
            compute fell back to the CPU.
    """
    if not sources or not len(feeds):
        raise InputError("there is nothing to time: give a model, and inputs with --data or --shape")
    if cuda_graph and provider != "cuda":
        raise InputError("a CUDA graph needs CUDA: add --provider cuda")
    used = feeds[:_MOST_FEEDS]
    _start_device(provider)
    variants = [source if isinstance(source, Variant) else Variant(source) for source in sources]
    entrants = [Entrant(variant, used, provider=provider, threads=threads, cuda_graph=cuda_graph, use_tf32=use_tf32,
                        warm_up=3, allow_cpu=allow_cpu) for variant in variants]
    times = _rounds(entrants, len(used), [True, False] if cuda_graph else [False], seconds, min_rounds, max_rounds, progress)
    rows = [_row(entrant, times[:, place]) for place, entrant in enumerate(entrants)]
    if keep_times:
        for place, row in enumerate(rows):
            row["times_ms"] = times[:, place, 0].tolist()
    return {"machine": {**machine(provider, threads, use_tf32), "cuda_graph": cuda_graph, "feeds": feeds.kind,
                        "rounds": len(times)},
            "provider": provider,
            "models": rows,
            "ratios": [{"model": entrant.variant.title, **_ratios(times[:, 0] / times[:, place])}
                       for place, entrant in enumerate(entrants) if place]}


def _start_device(provider: str) -> None:
    """Run something small first: what ONNX Runtime and CUDA set up once is not the first model's to pay."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "start", [value], [result])
    tiny = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    session = onnx_runtime().InferenceSession(tiny.SerializeToString(), session_options({}, 1, True),
                                              providers=providers(provider, {}, False), enable_fallback=False)
    session.run(None, {"x": np.zeros(1, np.float32)})


def _rounds(entrants: Sequence[Entrant], feeds: int, graphs: Sequence[bool], seconds: float, least: int, most: int,
            progress: Callable[[int, int], None] | None) -> Array:
    """Milliseconds of every run: ``[rounds, entrants, graphs]``."""
    random = np.random.default_rng(0)
    times: list[Array] = []
    start = told = time.perf_counter()
    while len(times) < most and (len(times) < least or time.perf_counter() - start < seconds):
        row = np.zeros((len(entrants), len(graphs)))
        for turn in random.permutation(row.size):
            place, kind = divmod(int(turn), len(graphs))
            row[place, kind] = entrants[place].milliseconds(len(times) % feeds, graph=graphs[kind])
        times.append(row)
        now = time.perf_counter()
        if progress is not None and now - told > 0.2:
            told = now
            expected = int(len(times) * max(1.0, seconds / (now - start)))
            progress(len(times), min(most, max(least, expected, len(times))))
    return np.stack(times)


def _row(entrant: Entrant, milliseconds: Array) -> dict[str, Any]:
    """An entry of ``models``, from times ``[rounds, graphs]``."""
    place = entrant.placement.to_json() if entrant.placement is not None else dict.fromkeys(
        ("nodes_by_provider", "memcpy_nodes", "fallback_nodes"))
    if entrant.session.provider == "cpu" and place["fallback_nodes"]:
        place["fallback_nodes"] = []  # they are where they were asked to be
    row = {"model": entrant.variant.title, **_percentiles(milliseconds[:, 0]), "load_ms": entrant.load_ms,
           "bytes": entrant.variant.bytes, "peak_bytes": entrant.peak_bytes, **place}
    return row if milliseconds.shape[1] == 1 else {**row, "without_cuda_graph": _percentiles(milliseconds[:, 1])}


def _percentiles(milliseconds: Array) -> dict[str, float]:
    return {f"p{share}_ms": float(np.percentile(milliseconds, share)) for share in (50, 90, 99)}


def _ratios(ratios: Array) -> dict[str, Any]:
    """An entry of ``ratios``, from paired ratios ``[rounds, graphs]``."""
    found: dict[str, Any] = _ratio(ratios[:, 0])
    return found if ratios.shape[1] == 1 else {**found, "without_cuda_graph": _ratio(ratios[:, 1])}


def _ratio(ratios: Array) -> dict[str, float]:
    """The median of paired ratios ``[rounds]`` and its 95 % interval."""
    random = np.random.default_rng(0)
    medians = np.array([np.median(random.choice(ratios, len(ratios))) for _ in range(_RESAMPLES)])
    low, high = np.percentile(medians, (2.5, 97.5))
    return {"speedup": float(np.median(ratios)), "low": float(low), "high": float(high)}
