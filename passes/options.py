"""Options of a pass: the fields of its dataclass, read from a command line or a plan file."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..graph.errors import InputError
from .blocks import Blocks

if TYPE_CHECKING:
    from .base import Pass

P = typing.TypeVar("P", bound="Pass")


def make(kind: type[P], given: Mapping[str, object]) -> P:
    """An instance of ``kind`` with the options ``given`` as text or as YAML values.

    Raises:
        InputError: an option the pass does not have, or a value it does not take.
    """
    hints = typing.get_type_hints(kind)
    names = [each.name for each in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in names:
            known = ", ".join(names) if names else "none"
            raise InputError(f"pass '{kind.name}' has no option '{key}': it has {known}")
        values[key] = _read(f"{kind.name}:{key}", hints[key], value)
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(f"pass '{kind.name}': {error}") from None


def given_options(instance: Pass) -> dict[str, object]:
    """The options of ``instance`` that differ from their defaults, as a plan file holds them."""
    found: dict[str, object] = {}
    for each in dataclasses.fields(instance):
        value = getattr(instance, each.name)
        if value != each.default:
            found[each.name] = str(value) if isinstance(value, Blocks) else value
    return found


def describe(kind: type[Pass]) -> list[dict[str, object]]:
    """Name, type, default and help of each option."""
    hints = typing.get_type_hints(kind)
    return [{"name": each.name, "type": _title(hints[each.name]), "help": each.metadata.get("help", ""),
             "default": str(each.default) if isinstance(each.default, Blocks) else each.default}
            for each in dataclasses.fields(kind)]


def _title(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(str(value) for value in typing.get_args(hint))
    return " or ".join(_plain(part) for part in _parts(hint))


def _plain(hint: Any) -> str:
    return {int: "number", float: "real number", bool: "true|false", str: "text", Blocks: "blocks",
            type(None): "nothing"}.get(hint, str(hint))


def _parts(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _read(where: str, hint: Any, value: object) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        for choice in choices:
            if str(value).lower() == str(choice).lower():
                return choice
        raise InputError(f"{where}={value}: choose one of {', '.join(str(choice) for choice in choices)}")
    for part in _parts(hint):
        try:
            return _convert(part, value)
        except (ValueError, TypeError):
            continue
    raise InputError(f"{where}={value}: not a {_title(hint)}")


def _convert(kind: Any, value: object) -> Any:
    if kind is Blocks:
        return Blocks.parse(value)
    if kind is type(None):
        if value is None or str(value).lower() in ("", "none"):
            return None
        raise ValueError
    if kind is bool:
        text = str(value).lower()
        if text in ("true", "yes", "1", "on"):
            return True
        if text in ("false", "no", "0", "off"):
            return False
        raise ValueError
    if kind is int:
        return int(str(value))
    if kind is float:
        number = float(str(value))
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError
        return number
    return str(value)
