"""Grids of input shapes: ``NAME=1,8x16,128`` is every batch with every length."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ..graph.errors import InputError

Shape = tuple[int, ...]


def parse_grid(texts: Sequence[str]) -> list[dict[str, Shape]]:
    """The points of a grid, each a shape for some inputs.

    ``NAME=1,8x16,128`` are the shapes 1×16, 1×128, 8×16 and 8×128, and so are ``NAME=1x16``, ``NAME=1x128``, … given one
    after the other. Inputs with as many shapes each go together, point by point; an input with one shape has it at every
    point. ``NAME=`` is a scalar. Of nothing: one point that says nothing.

    Raises:
        InputError: a text of another form, a size of 0, or two inputs with different numbers of shapes.
    """
    shapes: dict[str, list[Shape]] = {}
    for text in texts:
        name, found = _parse(text)
        shapes.setdefault(name, []).extend(found)
    count = max((len(each) for each in shapes.values()), default=1)
    for name, each in shapes.items():
        if len(each) not in (1, count):
            other = next(key for key, values in shapes.items() if len(values) == count)
            raise InputError(f"--shape: '{name}' has {len(each)} shapes and '{other}' has {count}: give each input one, or as "
                             "many as the others")
    points = [{name: each[number % len(each)] for name, each in shapes.items()} for number in range(count)]
    return list({tuple(point.items()): point for point in points}.values())


def shape_text(point: dict[str, Shape]) -> str:
    """A point for people: ``input_ids 8x128``."""
    return ", ".join(f"{name} {'x'.join(map(str, shape)) or 'scalar'}" for name, shape in point.items())


def _parse(text: str) -> tuple[str, list[Shape]]:
    name, equals, dims = text.rpartition("=")
    if not equals or not name or not re.fullmatch(r"(\d+(,\d+)*(x\d+(,\d+)*)*)?", dims):
        raise InputError(f"shape '{text}': write it like NAME=1x128, or NAME=1,8x16,128 for a grid")
    choices = [[int(size) for size in dim.split(",")] for dim in dims.split("x")] if dims else []
    if any(size < 1 for sizes in choices for size in sizes):
        raise InputError(f"shape '{text}': a size is at least 1: there is nothing to run on otherwise")
    return name, [tuple(shape) for shape in itertools.product(*choices)]
