"""The protobuf wire format of an ONNX file, read and written without its weights.

A ``TensorProto`` keeps its numbers in one length-delimited field (``raw_data``, or packed ``float_data`` or
``double_data``, which hold the same bytes). Scanning notes where in the file those bytes lie and puts a marker in
their place, so that the parsed model is small; expanding puts the bytes back, as pieces to be streamed.

Source: https://protobuf.dev/programming-guides/encoding/ and onnx.proto of the ONNX repository (field numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MARKER = "ffnfold:weight"
"""Key of the ``external_data`` entry that stands for a weight left in a file; its value names the weight."""
SMALLEST = 1024
"""Bytes. Shorter payloads, and messages that can hold no longer one, stay where they are."""
LARGEST_SKELETON = 256 << 20
"""Bytes that a model may have beside its weights."""
LARGEST_TEXT = 32 << 20
"""Bytes that one text (a name, a description, metadata, an attribute) may have."""
MOST_NODES = 250_000
"""Nodes that one graph may have."""
_DEEPEST = 100  # nested messages, as protobuf itself allows
_MARKER = MARKER.encode()
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_TENSOR = "tensor"
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: _TENSOR},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph"},
    "function": {7: "node", 11: "attribute"},
}
_RAW, _FLOATS, _DOUBLES, _STRINGS = 9, 4, 10, 6
_PAYLOADS = frozenset({_RAW, _FLOATS, _DOUBLES})
_DATA = _PAYLOADS | {5, 6, 7, 11}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_NODES = {"graph": 1, "function": 7}
_NUMBERS = {("attribute", 7), ("attribute", 8), ("attribute", 22), ("attribute", 23), ("graph", 15)}  # lists, sparse tensors

T = TypeVar("T")


class WireError(ValueError):
    """The bytes are not a protobuf message; says where."""


class Bytes(Protocol):
    """Random access to bytes: a file or a buffer."""

    size: int

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``, all of them."""


@dataclass(frozen=True)
class Payload:
    """Where the numbers of a tensor lie.

    Attributes:
        offset, nbytes: in the file.
        field: number of the field they are in.
    """

    offset: int
    nbytes: int
    field: int


class Buffer:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``."""
        return self.data[start:end]


class _Cursor:
    """Reads varints from a window that moves over the bytes."""

    _WINDOW = 1 << 14

    def __init__(self, source: Bytes) -> None:
        self._source = source
        self._window = b""
        self._start = 0

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """The number at ``position`` and the position behind it."""
        offset = position - self._start
        if offset < 0 or offset + 10 > len(self._window):
            self._start = position
            self._window = self._source.read(position, min(position + self._WINDOW, self._source.size))
            offset = 0
        if position < end and self._window[offset] < 0x80:  # most have one byte
            return self._window[offset], position + 1
        value = shift = 0
        for byte in self._window[offset:offset + min(10, end - position)]:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position + shift // 7
        raise WireError(f"a number at byte {position} does not end")

    def field(self, position: int, end: int) -> tuple[int, int, int, int]:
        """Number and wire type of the field at ``position``, and where its content begins and ends."""
        tag, start = self.varint(position, end)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise WireError(f"no field has the number {number} (byte {position})")
        if kind == _BYTES:
            length, start = self.varint(start, end)
            stop = start + length
        elif kind == _VARINT:
            _, stop = self.varint(start, end)
        elif kind in (_FIXED64, _FIXED32):
            stop = start + (8 if kind == _FIXED64 else 4)
        else:
            raise WireError(f"unknown wire type {kind} (byte {position})")
        if stop > end:
            raise WireError(f"it ends {stop - end} bytes early, in the field at byte {position}")
        return number, kind, start, stop


class Scanner:
    """Takes the weights out of a serialized ``ModelProto``.

    Args:
        source: the bytes.
        key: gives the name of a payload, to be found again in the marker that replaces it.
    """

    def __init__(self, source: Bytes, key: Callable[[Payload], str]) -> None:
        self._source = source
        self._cursor = _Cursor(source)
        self._key = key
        self._kept = 0

    def skeleton(self) -> bytes:
        """The message without its weights.

        Raises:
            WireError: it is not a protobuf message, or larger beside its weights than a model can be.
        """
        return self._message(0, self._source.size, "model", 0)

    def _read(self, start: int, end: int) -> bytes:
        self._kept += end - start
        if self._kept > LARGEST_SKELETON:
            raise WireError(f"it holds more than {LARGEST_SKELETON >> 20} MB beside its weights")
        return self._source.read(start, end)

    def _message(self, start: int, end: int, kind: str, depth: int) -> bytes:
        if depth > _DEEPEST:
            raise WireError(f"messages are nested more than {_DEEPEST} deep")
        inner = _FIELDS[kind]
        pieces = []
        run = position = start
        node_field, nodes = _NODES.get(kind), 0
        while position < end:
            number, wire, begin, stop = self._cursor.field(position, end)
            if number == node_field:
                nodes += 1
                if nodes > MOST_NODES:
                    raise WireError(f"it holds more than {MOST_NODES:,} nodes")
            if stop - begin > LARGEST_TEXT and number not in inner and (kind, number) not in _NUMBERS:
                raise _too_long(begin, stop)
            if wire == _BYTES and stop - begin > SMALLEST and number in inner:
                child = inner[number]
                content = (self._tensor(begin, stop) if child == _TENSOR
                           else self._message(begin, stop, child, depth + 1))
                pieces += [self._read(run, position), encode_header(number, len(content)), content]
                run = stop
            position = stop
        pieces.append(self._read(run, end))
        return b"".join(pieces)

    def _tensor(self, start: int, end: int) -> bytes:
        payload, others, position = None, [], start
        while position < end:
            number, wire, begin, stop = self._cursor.field(position, end)
            if number in _PAYLOADS and wire == _BYTES and stop - begin >= SMALLEST and payload is None:
                payload = Payload(begin, stop - begin, number)
            elif number in _DATA:
                if number == _STRINGS and stop - begin > LARGEST_TEXT:
                    raise _too_long(begin, stop)
                return self._read(start, end)  # numbers in several pieces, or one by one: left to protobuf
            else:
                if stop - begin > LARGEST_TEXT:
                    raise _too_long(begin, stop)
                others.append((position, stop))
            position = stop
        if payload is None:
            return self._read(start, end)
        return b"".join([self._read(a, b) for a, b in others]) + marker(self._key(payload))


def _too_long(begin: int, stop: int) -> WireError:
    return WireError(f"the text at byte {begin} has {stop - begin} bytes, which no model needs")


def marker(key: str) -> bytes:
    """The fields of a ``TensorProto`` that say its numbers are elsewhere, under ``key``."""
    name, value = _MARKER, key.encode()
    entry = encode_header(1, len(name)) + name + encode_header(2, len(value)) + value
    return (encode_header(_EXTERNAL_DATA, len(entry)) + entry
            + encode_varint(_DATA_LOCATION << 3 | _VARINT) + b"\x01")


def expand(skeleton: bytes, weight: Callable[[str], tuple[T, int, int]]) -> tuple[list[bytes | T], int]:
    """A serialized model with its weights put back.

    Args:
        skeleton: a serialized ``ModelProto`` with markers.
        weight: key → (the weight, its bytes, the field it goes into).

    Returns:
        What to write, in order: bytes, and weights to be streamed; and the number of bytes in all.
    """
    return _Expander(skeleton, weight).message(0, len(skeleton), "model")


class _Expander(Generic[T]):
    def __init__(self, skeleton: bytes, weight: Callable[[str], tuple[T, int, int]]) -> None:
        self._data = skeleton
        self._cursor = _Cursor(Buffer(skeleton))
        self._weight = weight

    def message(self, start: int, end: int, kind: str) -> tuple[list[bytes | T], int]:
        inner = _FIELDS[kind]
        pieces: list[bytes | T] = []
        length = 0
        run = position = start
        while position < end:
            number, _, begin, stop = self._cursor.field(position, end)
            if number in inner and self._data.find(_MARKER, begin, stop) >= 0:
                child = inner[number]
                content, size = self._tensor(begin, stop) if child == _TENSOR else self.message(begin, stop, child)
                header = encode_header(number, size)
                pieces += [self._data[run:position], header, *content]
                length += position - run + len(header) + size
                run = stop
            position = stop
        pieces.append(self._data[run:end])
        return pieces, length + end - run

    def _tensor(self, start: int, end: int) -> tuple[list[bytes | T], int]:
        kept, key, position = [], None, start
        while position < end:
            number, _, begin, stop = self._cursor.field(position, end)
            found = self._marked(begin, stop) if number == _EXTERNAL_DATA else None
            if found is not None:
                key = found
            elif number != _DATA_LOCATION:
                kept.append(self._data[position:stop])
            position = stop
        if key is None:
            return [self._data[start:end]], end - start
        weight, nbytes, field = self._weight(key)
        head = b"".join(kept) + encode_header(field, nbytes)
        return [head, weight], len(head) + nbytes

    def _marked(self, start: int, end: int) -> str | None:
        """The key of a weight, if the entry of ``external_data`` between ``start`` and ``end`` is a marker."""
        position = start
        fields = {1: b"", 2: b""}
        while position < end:
            number, _, begin, position = self._cursor.field(position, end)
            fields[number] = self._data[begin:position]
        return fields[2].decode() if fields[1] == _MARKER else None


def encode_varint(value: int) -> bytes:
    """``value`` as a base-128 varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return encode_varint(number << 3 | _BYTES) + encode_varint(length)
