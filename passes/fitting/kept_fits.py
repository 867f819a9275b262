"""Fits of single blocks, kept in a folder, so that plans that begin alike do not fit the same block twice.

What a fit gives depends on the model, the feeds, the passes before, the options, and what became of the blocks before it: all
that is in its name. So what is read is what would have been computed, bit for bit. Where ONNX Runtime is stopped between two
blocks changes the last bits of what it computes; so it is stopped behind a block whose fit is read, too.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...graph.block import FFNBlock
from ..base import Pass
from ..options import given_options
from ..plan import Plan
from .neuron_fit import NeuronFit


class Fits:
    """Fits that are there already.

    Args:
        folder: where; one for each model, set of feeds, provider and number of threads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._before: list[object] = []

    def begin(self, before: Plan, each: Pass) -> None:
        """Say that the pass ``each`` begins, after those of ``before``."""
        options = {key: value for key, value in given_options(each).items() if key not in ("blocks", "keep", "widths")}
        self._before = [before.entries(), each.name, options]

    def load(self, block: FFNBlock, width: str) -> NeuronFit | None:
        """The fit of ``block`` at ``width`` (see :class:`~.widths.Width`); None where it was not made yet."""
        try:
            with np.load(self._file(block.index, width), allow_pickle=False) as held:
                return NeuronFit.of_arrays({name: held[name] for name in held.files})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, block: FFNBlock, width: str, fit: NeuronFit) -> None:
        """Keep a fit; the blocks after this one are fitted on what it gives."""
        file = self._file(block.index, width)
        if not file.exists():
            partial = file.with_suffix(f".part{os.getpid()}")
            with partial.open("wb") as opened:
                np.savez(opened, allow_pickle=False, **fit.to_arrays())
            os.replace(partial, file)
        self._before.append((block.index, width))

    def has(self, block: FFNBlock, width: str, later: Sequence[tuple[int, str]]) -> bool:
        """Whether there are fits of all of ``later``, index and width, which come one after the other behind ``block``."""
        chain = [(block.index, width), *later]
        return all(self._file(*each, chain[:place]).exists() for place, each in enumerate(chain) if place)

    def _file(self, index: int, width: str, since: Sequence[tuple[int, str]] = ()) -> Path:
        name = hashlib.sha256(repr(([*self._before, *since], index, width)).encode()).hexdigest()[:32]
        return self._folder / f"{name}.npz"

