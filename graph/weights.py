"""Weights that stay where they are until somebody needs their numbers.

A ``gs.Constant`` holds one of these in the place of an array. Nothing here is cached: ``load`` gives a fresh array
each time, and what is written to a file is written in tiles.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from .digests import WORKERS, digest_of
from .errors import InputError
from .files import Source
from .types import bits_of, numpy_type, onnx_type_of
from .wire import MARKER, SMALLEST

Array = npt.NDArray[Any]
_TILE = 1 << 24
_numbers = itertools.count()


class Values(LazyValues):  # type: ignore[misc]
    """Numbers of a tensor, not loaded.

    Attributes:
        shape: dimensions.
        onnx_type: element type (``TensorProto.DataType``).
        field: number of the ``TensorProto`` field that they go into inside a protobuf (9: ``raw_data``).
    """

    field = 9

    def __init__(self, shape: tuple[int, ...], onnx_type: int) -> None:
        self.shape = tuple(int(dim) for dim in shape)
        self.onnx_type = int(onnx_type)
        self._digest: bytes | None = None
        self._key: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Array type; ml_dtypes' for bfloat16, float8 and 4-bit types."""
        return numpy_type(self.onnx_type)

    @property
    def size(self) -> int:
        """Number of elements."""
        return size_of(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes as stored: two 4-bit elements to a byte; 0 for strings."""
        return nbytes_of(self.shape, self.onnx_type)

    @property
    def key(self) -> str:
        """Names this weight in the stubs that stand for it."""
        if self._key is None:
            self._key = str(next(_numbers))
        return self._key

    @property
    def by_rows(self) -> bool:
        """Whether ``rows`` loads, or computes, no more than the rows it is asked for."""
        return False

    def load(self) -> Array:
        """A fresh array of ``shape``, one element a number also for 4-bit types."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` (of the first axis), loading no more where that can be helped."""
        return self.load()[start:stop]

    def tiles(self, max_bytes: int = _TILE) -> Iterator[bytes | memoryview]:
        """The bytes as stored (little-endian, row-major), a tile at a time."""
        yield from _cut(_stored_bytes(self.load()), max_bytes)

    def digest(self) -> bytes:
        """SHA-256 of the bytes as stored. Kept, as it is needed more than once."""
        if self._digest is None:
            hasher = hashlib.sha256()
            for tile in self.tiles():
                hasher.update(tile)
            self._digest = hasher.digest()
        return self._digest

    def note_digest(self, digest: bytes) -> None:
        """Keep the digest that somebody took of the tiles."""
        self._digest = digest


class StoredValues(Values):
    """Numbers that lie in a file, byte for byte as ``raw_data`` would hold them."""

    def __init__(self, shape: tuple[int, ...], onnx_type: int, source: Source, offset: int, *, field: int = 9) -> None:
        super().__init__(shape, onnx_type)
        self.source = source
        self.offset = offset
        self.field = field
        self._digesting: Future[bytes] | None = None

    def load(self) -> Array:
        """A fresh array, read from the file."""
        return self._read(self.offset, self.shape)

    @property
    def by_rows(self) -> bool:
        """Whether an element has whole bytes."""
        return bits_of(self.onnx_type) >= 8 and bool(self.shape)

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop``, read from the file."""
        if bits_of(self.onnx_type) < 8:
            return super().rows(start, stop)
        row = nbytes_of(self.shape[1:], self.onnx_type)
        return self._read(self.offset + start * row, (stop - start, *self.shape[1:]))

    def _read(self, offset: int, shape: tuple[int, ...]) -> Array:
        buffer = np.empty(nbytes_of(shape, self.onnx_type), np.uint8)
        self.source.read_into(buffer.data, offset)
        if bits_of(self.onnx_type) >= 8:
            return buffer.view(self.dtype.newbyteorder("<")).reshape(shape)
        tensor = onnx.TensorProto(dims=shape, data_type=self.onnx_type, raw_data=buffer.tobytes())
        return np.array(numpy_helper.to_array(tensor))

    def memmap(self) -> Array:
        """A read-only array over the file where elements are whole bytes and aligned, else a fresh one."""
        if bits_of(self.onnx_type) < 8 or self.offset % self.dtype.itemsize or not self.size:
            return self.load()
        flat = np.memmap(self.source.open(), np.uint8, "r", self.offset, (self.nbytes,))
        return flat.view(self.dtype).reshape(self.shape)

    @property
    def place(self) -> Path | None:
        """The file to map it from, links followed; None where that cannot be done (as in :meth:`memmap`) or the file is gone."""
        if bits_of(self.onnx_type) < 8 or self.offset % self.dtype.itemsize:
            return None
        return self.source.real_path()

    def tiles(self, max_bytes: int = _TILE) -> Iterator[bytes | memoryview]:
        """The bytes in the file, a tile at a time."""
        end = self.offset + self.nbytes
        for start in range(self.offset, end, max_bytes):
            yield self.source.read(start, min(start + max_bytes, end))

    def start_digest(self) -> None:
        """Let a thread take the digest meanwhile."""
        if self._digest is None and self._digesting is None:
            self._digesting = WORKERS.submit(digest_of, self.source, self.offset, self.nbytes)

    def cancel_digest(self) -> None:
        """Leave the digest, if nobody has begun to take it."""
        if self._digesting is not None and self._digesting.cancel():
            self._digesting = None

    def digest(self) -> bytes:
        """SHA-256 of the bytes as stored."""
        if self._digest is None:
            if self._digesting is None:
                self._digest = digest_of(self.source, self.offset, self.nbytes)
            else:
                self._digest = self._digesting.result()
                self._digesting = None
        return self._digest


class ComputedValues(Values):
    """Numbers computed each time they are asked for.

    Args:
        compute: gives the array (any type that converts to the element type).
        rows: gives rows ``start`` to ``stop`` of it; lets a large matrix be written without ever being whole.
    """

    def __init__(self, shape: tuple[int, ...], onnx_type: int, compute: Callable[[], Array],
                 rows: Callable[[int, int], Array] | None = None) -> None:
        super().__init__(shape, onnx_type)
        self._compute = compute
        self._rows = rows

    def load(self) -> Array:
        """A fresh array, computed."""
        with np.errstate(invalid="ignore"):  # of weights that hold NaN
            array = np.asarray(self._compute())
        if array.shape != self.shape:
            raise ValueError(f"computed {array.shape}, declared {self.shape}")
        return np.ascontiguousarray(self._typed(array))

    @property
    def by_rows(self) -> bool:
        """Whether there is a way to compute some rows only."""
        return self._rows is not None

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop``, computed."""
        if self._rows is None:
            return super().rows(start, stop)
        with np.errstate(invalid="ignore"):
            return self._typed(np.asarray(self._rows(start, stop)))

    def tiles(self, max_bytes: int = _TILE) -> Iterator[bytes | memoryview]:
        """The bytes, computed a group of rows at a time where that is possible."""
        if self._rows is None or bits_of(self.onnx_type) < 8 or not self.shape or not self.size:
            yield from super().tiles(max_bytes)
            return
        step = max(1, max_bytes // max(1, self.nbytes // self.shape[0]))
        for start in range(0, self.shape[0], step):
            yield _stored_bytes(np.ascontiguousarray(self.rows(start, min(start + step, self.shape[0]))))

    def _typed(self, array: Array) -> Array:
        """``array`` in the element type. Raises InputError where a finite number would become infinite."""
        try:
            with np.errstate(over="raise"):
                return array.astype(self.dtype, copy=False)
        except FloatingPointError:
            raise InputError(f"a weight of shape {list(self.shape)} that was computed has numbers too large for {self.dtype}: "
                             "leave out the pass that folds into it") from None


class InlineValues(Values):
    """Numbers held in memory: those of a small tensor of the file, or an array made by a pass."""

    def __init__(self, held: Array | onnx.TensorProto) -> None:
        if isinstance(held, onnx.TensorProto):
            super().__init__(tuple(held.dims), held.data_type)
        else:
            super().__init__(held.shape, onnx_type_of(held.dtype))
        self.held = held

    def load(self) -> Array:
        """A fresh array."""
        if not isinstance(self.held, onnx.TensorProto):
            return self.held.copy()
        check_size(self.held)
        try:
            return np.array(numpy_helper.to_array(self.held))
        except (ValueError, TypeError) as error:
            raise InputError(f"tensor '{self.held.name}' cannot be read ({error}): export the model again") from None


def values_of(tensor: onnx.TensorProto, values: Mapping[str, Values]) -> Values:
    """What ``tensor`` holds or, where it is a stub, stands for."""
    key = stub_key(tensor)
    return InlineValues(tensor) if key is None else values[key]


def stub_key(tensor: onnx.TensorProto) -> str | None:
    """The key of the weight that ``tensor`` stands for; None where it is no stub."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return next((entry.value for entry in tensor.external_data if entry.key == MARKER), None)


def tensor_proto(name: str, values: Values) -> tuple[onnx.TensorProto, str | None]:
    """``values`` as a tensor: whole where it is small and in memory, else a stub and its key."""
    if isinstance(values, InlineValues) and (values.nbytes < SMALLEST or isinstance(values.held, onnx.TensorProto)):
        if isinstance(values.held, onnx.TensorProto):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(values.held)
        else:
            tensor = numpy_helper.from_array(values.held)
        tensor.name = name
        return tensor, None
    tensor = onnx.TensorProto(name=name, dims=values.shape, data_type=values.onnx_type)
    point(tensor, values.key)
    return tensor, values.key


def point(tensor: onnx.TensorProto, key: str) -> None:
    """Make ``tensor``, which has no numbers, the stub of the weight called ``key``."""
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key=MARKER, value=key)


def size_of(shape: tuple[int, ...]) -> int:
    """Number of elements, whatever the size (no overflow)."""
    total = 1
    for dim in shape:
        total *= int(dim)
    return total


def nbytes_of(shape: tuple[int, ...], onnx_type: int) -> int:
    """Bytes that the numbers take as stored."""
    return (size_of(shape) * bits_of(onnx_type) + 7) // 8


def check_size(tensor: onnx.TensorProto) -> None:
    """Check that ``tensor`` holds as many numbers as its dimensions say.

    Raises:
        InputError: it does not, a dimension is negative, or its type is unknown.
    """
    where = f"tensor '{tensor.name}' of shape {list(tensor.dims)}"
    if any(dim < 0 for dim in tensor.dims):
        raise InputError(f"{where} has a negative dimension: export the model again")
    if tensor.data_type == onnx.TensorProto.STRING:
        found, wanted = len(tensor.string_data), size_of(tuple(tensor.dims))
    else:
        bits = bits_of(tensor.data_type)
        if not bits:
            raise InputError(f"{where} has the unknown element type {tensor.data_type}: update onnx")
        if tensor.HasField("raw_data"):
            found, wanted = len(tensor.raw_data), nbytes_of(tuple(tensor.dims), tensor.data_type)
        else:
            found, wanted = _listed(tensor, bits)
    if found != wanted:
        raise InputError(f"{where} should hold {wanted} numbers or bytes but holds {found}: the file is damaged")


def _listed(tensor: onnx.TensorProto, bits: int) -> tuple[int, int]:
    size = size_of(tuple(tensor.dims))
    kind = onnx.TensorProto
    if tensor.data_type in (kind.COMPLEX64, kind.COMPLEX128):
        size *= 2
    elif bits < 8:
        size = (size * bits + 7) // 8
    lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return max(len(numbers) for numbers in lists), size


def _stored_bytes(array: Array) -> memoryview:
    if bits_of(onnx_type_of(array.dtype)) >= 8:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return memoryview(numpy_helper.from_array(array).raw_data)


def _cut(data: memoryview, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield data[start:start + size]
