"""Feeds: the inputs a model is run on, read from files one at a time."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..graph.errors import InputError
from .feed_check import check_array, check_keys, native
from .onnx_data import data_set_folders, is_data_set, load_data_set
from .specs import Array, InputSpec

Feed = dict[str, Any]
"""Input name → array; a list of arrays for a sequence; None for an optional without a value."""


class NamedFeed(dict[str, Any]):
    """A feed with its name for messages: the file it was read from, or its number.

    Attributes:
        where: that name.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def name_of(feed: Mapping[str, Any]) -> str | None:
    """What messages call ``feed``; None where it has no name."""
    return feed.where if isinstance(feed, NamedFeed) else None


_GOLDEN = (math.sqrt(5) - 1) / 2


class Feeds(Sequence[Feed]):
    """A sequence of feeds that can be gone through again and again; each is loaded when it is asked for, never kept.

    Attributes:
        synthetic: made up from the input specification; what is reported from them says so.
    """

    def __init__(self, load: Sequence[Callable[[], Feed]], *, synthetic: bool = False) -> None:
        self._load = tuple(load)
        self.synthetic = synthetic

    @classmethod
    def of(cls, feeds: Sequence[Mapping[str, Any]], *, synthetic: bool = False) -> Feeds:
        """Feeds that are in memory already."""
        return cls([partial(NamedFeed, feed, f"feed {number}") for number, feed in enumerate(feeds)], synthetic=synthetic)

    @property
    def kind(self) -> str:
        """``real`` or ``synthetic``."""
        return "synthetic" if self.synthetic else "real"

    def __len__(self) -> int:
        return len(self._load)

    def __iter__(self) -> Iterator[Feed]:
        return (load() for load in self._load)

    @overload
    def __getitem__(self, index: int) -> Feed: ...
    @overload
    def __getitem__(self, index: slice) -> Feeds: ...
    def __getitem__(self, index: int | slice) -> Feed | Feeds:
        if isinstance(index, slice):
            return Feeds(self._load[index], synthetic=self.synthetic)
        return self._load[index]()

    def mixed(self) -> Feeds:
        """The same feeds in an order whose every beginning is spread over all of them: by the fraction of i · golden ratio."""
        order = sorted(range(len(self._load)), key=lambda number: number * _GOLDEN % 1)
        return Feeds([self._load[number] for number in order], synthetic=self.synthetic)


def load_feeds(path: str | PathLike[str], inputs: Sequence[InputSpec]) -> Feeds:
    """The feeds that lie at ``path``, names, types and shapes checked against ``inputs`` now, numbers read later.

    Args:
        path: an ``.npz`` file; a folder of them (in order of name); a ``test_data_set_N`` folder of ``input_*.pb``, or a
            folder that holds several. Keys of an ``.npz`` are input names, or ``in:NAME`` (then ``out:NAME`` and
            ``ref:NAME`` beside them are ignored).
        inputs: the inputs of the model.

    Raises:
        InputError: nothing there, a damaged file, a key missing or unknown, a wrong type or shape.
    """
    path = Path(path)
    if os.path.isfile(path):  # unlike Path.is_file it does not fail on a name that is too long
        files = [path]
    elif not os.path.isdir(path):
        raise InputError(f"{path}: no such feed: give an .npz file or a folder of them")
    else:
        files = data_set_folders(path) or sorted(path.glob("*.npz"))
        if not files:
            raise InputError(f"{path}: holds no feed: put .npz files there, or test_data_set_N folders with input_*.pb")
    loaders: list[Callable[[], Feed]] = []
    for file in files:
        if is_data_set(file):
            load_data_set(file, inputs)
            loaders.append(partial(_load_folder, file, inputs))
        else:
            _check_headers(file, inputs)
            loaders.append(partial(_load_npz, file, inputs))
    return Feeds(loaders)


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``NAME=1x128`` as a name and a shape; ``NAME=`` is a scalar.

    Raises:
        InputError: it is not written like that.
    """
    name, equals, dims = text.rpartition("=")
    if not equals or not name or not re.fullmatch(r"(\d+(x\d+)*)?", dims):
        raise InputError(f"shape '{text}': write it like NAME=1x128")
    return name, tuple(int(dim) for dim in dims.split("x") if dim)


def _load_folder(folder: Path, inputs: Sequence[InputSpec]) -> Feed:
    return NamedFeed(load_data_set(folder, inputs), str(folder))


def _load_npz(file: Path, inputs: Sequence[InputSpec]) -> Feed:
    feed = NamedFeed({}, str(file))
    specs = {spec.name: spec for spec in inputs}
    try:
        with np.load(file, allow_pickle=False) as stored:
            for name, key in _keys(file, stored.files, inputs).items():
                feed[name] = _named(stored[key], specs[name])
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise InputError(f"{file}: cannot be read ({_first_line(error)}): write it again with numpy.savez") from None
    return feed


def _check_headers(file: Path, inputs: Sequence[InputSpec]) -> None:
    """Check names, types and shapes of an ``.npz`` without reading its numbers."""
    specs = {spec.name: spec for spec in inputs}
    try:
        with zipfile.ZipFile(file) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            for name, key in _keys(file, list(members), inputs).items():
                with archive.open(members[key]) as member:
                    version = np.lib.format.read_magic(member)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(member)
                check_array(f"{file}: '{key}'", specs[name], dtype, shape)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{file}: is not an .npz file ({_first_line(error)}): write it with numpy.savez") from None


def _keys(file: Path, keys: Sequence[str], inputs: Sequence[InputSpec]) -> dict[str, str]:
    """Input name → the key that holds it."""
    names = {spec.name for spec in inputs}
    if any(key.startswith("in:") and key not in names for key in keys):
        found = {key.removeprefix("in:"): key for key in keys if not key.startswith(("out:", "ref:"))}
    else:
        found = {key: key for key in keys}
    check_keys(str(file), found, inputs)
    return found


def _named(array: Array, spec: InputSpec) -> Array:
    """``array``, row-major, in this machine's byte order, in the type that NumPy's file format cannot name (bfloat16 is stored as
    two anonymous bytes)."""
    array = np.asarray(array, native(array.dtype), order="C")
    return array.view(spec.dtype) if array.dtype.kind == "V" else array


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
