"""What a run has finished with (moments, moved neurons), kept in a folder, so that the same run started again goes on there.

The folder holds one folder a run, named by a hash of all that its numbers depend on: the model, the plan, the feeds, how ONNX
Runtime runs, and the versions. In it what the fits asked for is numbered in order. The model is gone through all
the same, in the same pieces, so that what comes after is computed from the same bits; what is saved is the multiplying, which is
most.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...graph.errors import InputError
from ...runtime import Feeds, Scatter
from ...runtime.onnx_runtime import onnx_runtime

MEANING = 5
"""Raised where a fit comes to compute something else, so that no run goes on with numbers of before."""


class Resume:
    """What a run has finished with.

    Args:
        folder: where, made if it is not there.
        identity: what the numbers depend on beside the feeds.
        feeds: those that fit and those that choose.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], feeds: Sequence[Feeds]) -> None:
        versions = MEANING, __version__, onnx_runtime().__version__, np.__version__
        digest = hashlib.sha256(repr((*versions, sorted(identity.items()))).encode())
        for sequence in feeds:
            for feed in sequence:
                hash_feed(digest, feed)
        self.folder = folder / digest.hexdigest()[:32]
        self._number = -1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--cache {folder}: cannot be used as a folder ({error.strerror})") from None

    def load(self, count: int) -> list[Scatter] | None:
        """The next moments in order, ``count`` of them together; None where they are not there whole."""
        names = Scatter().to_arrays()
        held = self.load_arrays()
        if held is None or any(f"{name}{part}" not in held for name in names for part in range(count)):
            return None
        return [Scatter.of_arrays({name: held[f"{name}{part}"] for name in names}) for part in range(count)]

    def save(self, *moments: Scatter) -> None:
        """Keep what was last asked for."""
        self.save_arrays({f"{name}{part}": array for part, each in enumerate(moments)
                          for name, array in each.to_arrays().items()})

    def load_arrays(self) -> dict[str, Any] | None:
        """What else is next in order, by name; None where it is not there whole."""
        self._number += 1
        try:
            with np.load(self._file(), allow_pickle=False) as held:
                return {name: held[name] for name in held.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save_arrays(self, arrays: Mapping[str, Any]) -> None:
        """Keep what was last asked for."""
        partial = self._file().with_suffix(".part")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(partial, self._file())

    def done(self) -> None:
        """The run is over: nothing has to be kept."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self) -> Path:
        return self.folder / f"{self._number:04d}.npz"


def hash_feed(digest: Any, value: Any) -> None:
    """Add a feed, or a value of one, to a hash."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(repr(name).encode())
            hash_feed(digest, value[name])
    elif isinstance(value, (list, tuple)):
        digest.update(repr(len(value)).encode())
        for each in value:
            hash_feed(digest, each)
    else:
        array = np.asarray(value)
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes())
