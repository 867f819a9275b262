"""Measurements, kept on disk one file each, so that a search that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..graph.errors import InputError


class Records:
    """Measurements by key.

    Args:
        folder: where, made if it is not there.

    Attributes:
        measured: how many were made; reused: how many were there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.measured = self.reused = 0
        self._seen: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--cache {folder}: cannot be used as a folder ({error.strerror})") from None

    def get(self, *key: object) -> Any:
        """What was measured under ``key``; None where nothing was."""
        try:
            found = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if found.get("key") != repr(key):
            return None
        if repr(key) not in self._seen:
            self._seen.add(repr(key))
            self.reused += 1
        return found["value"]

    def put(self, value: Any, *key: object) -> None:
        """Keep a measurement: whole on disk, or not at all."""
        file = self._file(key)
        partial = file.with_suffix(f".part{os.getpid()}")
        partial.write_text(json.dumps({"key": repr(key), "value": value}), encoding="utf-8")
        os.replace(partial, file)
        self._seen.add(repr(key))
        self.measured += 1

    def measure(self, how: Callable[[], Any], *key: object) -> Any:
        """What is there under ``key``, or is measured and kept."""
        found = self.get(*key)
        if found is None:
            self.put(how(), *key)
            found = self.get(*key)  # as JSON gives it back: the same in this run and in the next
        return found

    def _file(self, key: tuple[object, ...]) -> Path:
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.json"


def default_folder() -> Path:
    """Where measurements are kept if nothing is said."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ffnfold" / "search"
