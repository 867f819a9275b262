"""ONNX test data: folders ``test_data_set_N`` of ``input_0.pb``, ``input_1.pb``, … (what onnx and the model zoo ship)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from ..graph.errors import InputError
from .feed_check import check_array, check_keys
from .specs import InputSpec


def is_data_set(path: Path) -> bool:
    """Whether ``path`` is a folder that holds ``input_*.pb``."""
    return path.is_dir() and bool(_input_files(path))


def data_set_folders(path: Path) -> list[Path]:
    """``path`` itself where it holds ``input_*.pb``, else its ``test_data_set_N`` folders in order of N."""
    if is_data_set(path):
        return [path]
    found = [folder for folder in path.glob("test_data_set_*") if is_data_set(folder)]
    return sorted(found, key=lambda folder: _number(folder.name))


def load_data_set(folder: Path, inputs: Sequence[InputSpec]) -> dict[str, Any]:
    """The feed in ``folder``. A file belongs to the input that its tensor is named after, else to the N-th input.

    Raises:
        InputError: a file is damaged, or does not fit the inputs of the model.
    """
    by_name = {spec.name: spec for spec in inputs}
    feed: dict[str, Any] = {}
    for file in _input_files(folder):
        data = file.read_bytes()
        name = _stored_name(data)
        position = _number(file.stem)
        if name not in by_name:
            if position >= len(inputs):
                raise InputError(f"{file}: the model has {len(inputs)} inputs, none called '{name}': remove the file")
            name = inputs[position].name
        if name in feed:
            raise InputError(f"{file}: input '{name}' is given twice: name its tensor after its input")
        feed[name] = _value(file, data, by_name[name])
    check_keys(str(folder), feed, inputs)
    return feed


def _input_files(folder: Path) -> list[Path]:
    numbered = [file for file in folder.glob("input_*.pb") if _number(file.stem) >= 0]
    return sorted(numbered, key=lambda file: _number(file.stem))


def _number(name: str) -> int:
    found = re.search(r"_(\d+)$", name)
    return int(found.group(1)) if found else -1


def _stored_name(data: bytes) -> str:
    """The name in a tensor, sequence or optional (its field number differs in the first)."""
    for kind in (onnx.TensorProto, onnx.SequenceProto, onnx.OptionalProto):
        try:
            name: str = kind.FromString(data).name
        except (DecodeError, UnicodeDecodeError):
            continue
        if name:
            return name
    return ""


def _value(file: Path, data: bytes, spec: InputSpec) -> Any:
    try:
        if spec.onnx_type.startswith("seq("):
            return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
        if spec.onnx_type.startswith("optional("):
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
        tensor = onnx.TensorProto.FromString(data)
        array = np.asarray(numpy_helper.to_array(tensor))
    except (DecodeError, UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file}: holds no {spec.onnx_type} for input '{spec.name}' ({reason}): write it again") from None
    dtype = np.dtype("U1") if spec.dtype == object and array.dtype == object else array.dtype
    check_array(f"{file}: '{spec.name}'", spec, dtype, array.shape)
    return array
