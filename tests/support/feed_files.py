"""Feeds in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_feeds(folder: Path, count: int, shape: Sequence[int] = (2, 16, 8), name: str = "x") -> Path:
    """``count`` .npz files of normal numbers, the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(3)
    for number in range(count):
        np.savez(folder / f"{number:02d}.npz", **{name: random.standard_normal(shape).astype(np.float32)})
    return folder
