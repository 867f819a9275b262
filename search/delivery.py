"""The files of a search in one archive, which each worker of a cluster unpacks once."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from ..graph.model import Model

_FEEDS = "feeds"
_MODEL = "model"


def pack(model: Path, data: Path, folder: Path) -> Path:
    """An archive of the model, the files that its weights lie in, and the feeds; its name carries a hash of its content."""
    loaded = Model.load(model)
    partial = folder / "files.zip"
    with zipfile.ZipFile(partial, "w") as archive:
        archive.write(model, f"{_MODEL}/{model.name}")
        for path in sorted(loaded.data_files):
            archive.write(path, f"{_MODEL}/{path.name}")
        for path in sorted(data.rglob("*")) if data.is_dir() else [data]:
            if path.is_file():
                archive.write(path, f"{_FEEDS}/{path.relative_to(data if data.is_dir() else data.parent)}")
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return partial.rename(folder / f"ffnfold-{digest.hexdigest()[:16]}.zip")


def unpacked(name: str, model: str) -> tuple[Path, Path]:
    """On a worker: the model and the feeds of the archive ``name``, unpacked now or before."""
    place = Path(importlib.import_module("distributed").get_worker().local_directory)
    folder = place / name.removesuffix(".zip")
    if not folder.exists():
        partial = Path(tempfile.mkdtemp(dir=place))
        with zipfile.ZipFile(place / name) as archive:
            archive.extractall(partial)
        try:
            os.rename(partial, folder)
        except OSError:  # another thread was faster
            shutil.rmtree(partial, ignore_errors=True)
    return folder / _MODEL / model, folder / _FEEDS
