"""What the processor's integer instructions do to sums of int8 products."""

from __future__ import annotations

import platform
from pathlib import Path

_DOT_PRODUCT = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}
_CPUINFO = Path("/proc/cpuinfo")


def products_saturate(flags: str | None = None, architecture: str | None = None) -> bool | None:
    """Whether ONNX Runtime's uint8 × int8 kernels may lose the sum of two products here.

    On x86-64 without VNNI they use ``vpmaddubsw``, which adds two neighbouring products in 16 bits and saturates: 2 · 255 · 127
    does not fit, 2 · 255 · 63 does. With VNNI (or AMX) and on ARM the sums are 32 bits wide.

    Args:
        flags: the processor's flags as ``/proc/cpuinfo`` has them; None reads that file.
        architecture: as ``platform.machine`` names it; None asks it.

    Returns:
        None where this system does not tell.
    """
    architecture = (architecture or platform.machine()).lower()
    if architecture not in ("x86_64", "amd64", "i686", "x86"):
        return False
    if flags is None:
        try:
            lines = _CPUINFO.read_text().splitlines()
        except OSError:
            return None
        flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), None)
    return None if flags is None else not _DOT_PRODUCT & set(flags.split())
