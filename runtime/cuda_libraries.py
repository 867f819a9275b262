"""CUDA's own libraries, found where pip put them.

ONNX Runtime looks for them beside its own package only. They often lie elsewhere: with the PyTorch of another
environment on the path, or where ONNX Runtime was installed with ``--target``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any


def preload_cuda(runtime: Any) -> None:
    """Load the libraries that the CUDA provider needs, from NVIDIA's packages on ``sys.path`` or from the system.

    Says nothing where there are none: then the provider cannot be loaded either, and that is reported.

    Args:
        runtime: the module ``onnxruntime``.
    """
    preload = getattr(runtime, "preload_dlls", None)
    if preload is None:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        for folder in library_folders():
            cudnn = bool(list(folder.glob("libcudnn.so*")))
            preload(cuda=not cudnn, cudnn=cudnn, directory=str(folder))
        preload()


def library_folders() -> list[Path]:
    """Folders of NVIDIA's packages with libraries that the provider links: cuBLAS, the runtime, cuRAND, cuFFT and cuDNN."""
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (found.submodule_search_locations or ())] if found is not None else []
    linked = ("libcublas.so*", "libcudart.so*", "libcurand.so*", "libcufft.so*", "libcudnn.so*")
    return sorted({library.parent for root in roots for pattern in linked for library in root.glob(f"*/lib/{pattern}")})
