"""Reading a model so that its weights stay in the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from .errors import InputError
from .files import Source, external_path
from .tensors import tensors
from .types import bits_of
from .weights import StoredValues, Values, check_size, nbytes_of, point, stub_key
from .wellformed import check_nodes
from .wire import Payload, Scanner, WireError

_FIELD_TYPES = {4: (onnx.TensorProto.FLOAT, onnx.TensorProto.COMPLEX64),
                10: (onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX128)}


@dataclass(frozen=True)
class Stored:
    """A model as it lies on disk.

    Attributes:
        proto: the model; tensors above about 1 KB are stubs without numbers.
        values: key of a stub → the weight.
        external: it has external data.
        path: the file.
        nbytes: size of the file and of the external data that its tensors use.
    """

    proto: onnx.ModelProto
    values: dict[str, Values]
    external: bool
    path: Path
    nbytes: int


def read_model(path: Path) -> Stored:
    """Read everything but the weights of the model in ``path``.

    Raises:
        InputError: no such file, not an ONNX model, damaged, or external data that is missing or not allowed.
    """
    source = Source(path)
    if not source.size:
        raise InputError(f"{path}: the file is empty: export or copy the model again")
    payloads: list[Payload] = []

    def remember(payload: Payload) -> str:
        payloads.append(payload)
        return str(len(payloads) - 1)

    try:
        skeleton = Scanner(source, remember).skeleton()
        proto = onnx.ModelProto.FromString(skeleton)
    except (WireError, DecodeError) as error:
        raise InputError(f"{path}: not an ONNX model, or damaged ({_line(error)}): "
                         "export or copy the model again") from None
    del skeleton
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output or proto.graph.initializer):
        raise InputError(f"{path}: not an ONNX model (it holds no graph): give the path of an .onnx file")
    try:
        check_nodes(proto)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    reader = _Reader(path, source, payloads)
    for tensor, _ in tensors(proto):
        reader.take(tensor)
    return Stored(proto, reader.values, bool(reader.files), path, source.size + reader.external_bytes)


class _Reader:
    """Turns stubs and external tensors into :class:`StoredValues`, each checked against its dimensions."""

    def __init__(self, path: Path, source: Source, payloads: list[Payload]) -> None:
        self.values: dict[str, Values] = {}
        self.files: dict[str, Source] = {}
        self.external_bytes = 0
        self._path = path
        self._source = source
        self._payloads = payloads
        self._seen: dict[tuple[str, int, int, int, tuple[int, ...]], StoredValues] = {}

    def take(self, tensor: onnx.TensorProto) -> None:
        """Note where the numbers of ``tensor`` lie and make it a stub; check it where they are in it."""
        try:
            number = stub_key(tensor)
            if number is not None and number.isdecimal() and int(number) < len(self._payloads):
                self._inside(tensor, self._payloads[int(number)])
            elif tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._outside(tensor)
            else:
                check_size(tensor)
        except InputError as error:
            text = str(error)
            raise InputError(text if text.startswith(str(self._path)) else f"{self._path}: {text}") from None

    def _inside(self, tensor: onnx.TensorProto, payload: Payload) -> None:
        shape = self._shape(tensor)
        if tensor.data_type not in _FIELD_TYPES.get(payload.field, (tensor.data_type,)):
            raise InputError(f"tensor '{tensor.name}' keeps its numbers in the wrong field: export the model again")
        self._size(tensor, shape, payload.nbytes)
        self._point(tensor, StoredValues(shape, tensor.data_type, self._source, payload.offset, field=payload.field))

    def _outside(self, tensor: onnx.TensorProto) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        where = f"external data of tensor '{tensor.name}'"
        if any(not isinstance(text, str) for entry in entries.items() for text in entry):  # what protobuf gives for other bytes
            raise InputError(f"{where} is not written in UTF-8: export the model again")
        if "location" not in entries:
            raise InputError(f"{where} names no file: export the model again")
        location = entries["location"]
        if location not in self.files:
            self.files[location] = Source(external_path(self._path, location), "external data file")
        file = self.files[location]
        offset = _number(entries.get("offset", "0"), where)
        shape = self._shape(tensor)
        # without a length the dimensions say how long it is, as for ONNX Runtime: more may follow in the file
        length = _number(entries["length"], where) if "length" in entries else nbytes_of(shape, tensor.data_type)
        if offset + length > file.size:
            raise InputError(f"{where} ends at byte {offset + length} of '{location}', which has {file.size}: "
                             "the data file is truncated or belongs to another model")
        self._size(tensor, shape, length)
        key = (location, offset, length, tensor.data_type, shape)
        values = self._seen.get(key)
        if values is None:
            values = self._seen[key] = StoredValues(shape, tensor.data_type, file, offset)
            self.external_bytes += length
        self._point(tensor, values)

    def _point(self, tensor: onnx.TensorProto, values: StoredValues) -> None:
        point(tensor, values.key)
        self.values[values.key] = values

    def _shape(self, tensor: onnx.TensorProto) -> tuple[int, ...]:
        if any(dim < 0 for dim in tensor.dims):
            raise InputError(f"tensor '{tensor.name}' has the shape {list(tensor.dims)}: export the model again")
        if not bits_of(tensor.data_type):
            raise InputError(f"tensor '{tensor.name}' has the element type {tensor.data_type}, which cannot lie "
                             "outside: export the model again")
        return tuple(tensor.dims)

    def _size(self, tensor: onnx.TensorProto, shape: tuple[int, ...], found: int) -> None:
        wanted = nbytes_of(shape, tensor.data_type)
        if found != wanted:
            raise InputError(f"tensor '{tensor.name}' of shape {list(shape)} should take {wanted} bytes but has "
                             f"{found}: the file is damaged")


def _number(text: str, where: str) -> int:
    if not text.isdecimal() or len(text) > 19:
        raise InputError(f"{where} has the offset or length '{text[:40]}', which is no number: export the model again")
    return int(text)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
