"""ONNX Runtime itself: importing it quietly, which provider there is, and its complaints in one line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from ..graph.errors import InputError
from .cuda_libraries import preload_cuda

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MISSING_KERNEL = "Could not find an implementation"
_FATAL = 4
_NO_KERNEL = (": there is no such kernel in the model's element type (a CPU has none for bfloat16): take another --provider, "
              "convert the model to float32 or float16 first, or 'optimize --no-verify' with passes that need no feeds")
_ON_FEED = ": check its values and sizes, e.g. that token ids are in the vocabulary and no dimension is 0"


@cache
def onnx_runtime() -> Any:
    """The module ``onnxruntime``, its log silenced, and sending nothing home unless ``ORT_DISABLE_TELEMETRY`` is set to 0.

    Raises:
        InputError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"ONNX Runtime cannot be imported ({error}): pip install 'ffnfold[cpu]' or 'ffnfold[gpu]'") from None
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def session_options(config: Mapping[str, str], threads: int | None, optimize: bool) -> Any:
    """``SessionOptions`` that print nothing.

    Args:
        config: session configuration entries, e.g. ``{"session.disable_quant_qdq": "1"}``.
        threads: threads inside an operator; None lets ONNX Runtime choose.
        optimize: False turns every graph optimization off.

    Raises:
        InputError: threads below 1, or an entry that ONNX Runtime does not take.
    """
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads={threads}: give 1 or more")
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in config.items():
        try:
            options.add_session_config_entry(key, value)
        except RuntimeError as error:
            raise InputError(f"session configuration entry '{key[:60]}': {one_line(error)}") from None
    return options


def providers(provider: str, settings: Mapping[str, str], use_tf32: bool) -> list[str | tuple[str, dict[str, str]]]:
    """The provider list for a session.

    Raises:
        InputError: no such provider, or the installed ONNX Runtime lacks it.
    """
    if provider not in PROVIDERS:
        raise InputError(f"provider '{provider}': choose from {', '.join(PROVIDERS)}")
    if provider == "cpu":
        return [PROVIDERS["cpu"]]
    if PROVIDERS[provider] not in onnx_runtime().get_available_providers():
        raise InputError("provider 'cuda': the installed ONNX Runtime has no CUDA: "
                         "pip uninstall onnxruntime, then pip install 'ffnfold[gpu]'")
    _preload()
    return [(PROVIDERS[provider], {"use_tf32": str(int(use_tf32)), **settings}), PROVIDERS["cpu"]]


@cache
def _preload() -> None:
    preload_cuda(onnx_runtime())


@contextlib.contextmanager
def complaints(name: str, doing: str, feed: str | None = None) -> Iterator[None]:
    """Turn what ONNX Runtime raises into an ``InputError`` of one line about the model ``name``, or the feed called ``feed``."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        said = one_line(error)
        if feed is not None:
            raise InputError(f"{feed}: ONNX Runtime cannot {doing} {name} on it: {said}{_ON_FEED}") from None
        mend = _NO_KERNEL if MISSING_KERNEL in said else ""
        raise InputError(f"{name}: ONNX Runtime cannot {doing} it: {said}{mend}") from None


def one_line(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its codes."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    text = re.sub(r"(/\S+/)?\S+\.(cc|h|cu|cuh):\d+ .*?\)(?: const)? ", "", text) or text
    return text if len(text) <= 300 else text[:297] + "..."
