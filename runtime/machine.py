"""The machine that a timing was made on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .. import __version__
from .onnx_runtime import onnx_runtime


def machine(provider: str, threads: int | None, use_tf32: bool) -> dict[str, Any]:
    """What a reader needs to know of it: processor, cores, memory, system, versions, threads.

    On CUDA also the GPU, its driver, the CUDA that ONNX Runtime was built with, and whether TF32 was allowed; else null.
    """
    cuda = provider == "cuda"
    gpu, driver = _gpu() if cuda else (None, None)
    return {"cpu": _cpu_model(), "cores": available_cores(), "memory_bytes": _memory_bytes(), "os": platform.platform(),
            "python": platform.python_version(), "onnxruntime": onnx_runtime().__version__, "onnx": onnx.__version__,
            "numpy": np.__version__, "ffnfold": __version__, "threads": threads,
            "gpu": gpu, "driver": driver, "cuda": getattr(onnx_runtime(), "cuda_version", None) if cuda else None,
            "tf32": use_tf32 if cuda else None}


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ResidentMemory:
    """How far the process's resident memory rises over what it was on entering; mapped file pages that were read count.

    Attributes:
        peak_bytes: the rise at its highest, after leaving; None where the system does not tell (only Linux does).
    """

    def __init__(self) -> None:
        self.peak_bytes: int | None = None

    def __enter__(self) -> ResidentMemory:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the highest resident size so far
            self._before = _status_bytes("VmRSS")
        except OSError:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        after = _status_bytes("VmHWM")
        if self._before is not None and after is not None:
            self.peak_bytes = max(0, after - self._before)


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> tuple[str | None, str | None]:
    """Name and driver version of the first GPU."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None, None
    name, _, driver = (found.stdout.strip().splitlines() or [""])[0].partition(",")
    return name.strip() or None, driver.strip() or None
