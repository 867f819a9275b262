"""What a section of the page is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each column. The first column names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds nothing but numbers."""
        columns = [[row[place] for row in self.rows if row[place] is not None] for place in range(len(self.columns))]
        return [bool(cells) and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in cells)
                for cells in columns]


@dataclass(frozen=True)
class Figure:
    """An SVG element, and what to say below it."""

    drawing: str
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its anchor.
        text: what it shows.
        feeds: ``real`` or ``synthetic``, where it was measured on inputs.
        code: as it stands (a plan).
    """

    key: str
    title: str
    text: str = ""
    feeds: str | None = None
    code: str | None = None
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = field(default_factory=tuple)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of models without the folders that they share."""
    parts = {name: PurePath(name).parts for name in dict.fromkeys(names)}
    for depth in range(1, max((len(each) for each in parts.values()), default=1) + 1):
        short = {name: "/".join(each[-depth:]) for name, each in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in parts}


def worst(outputs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The metrics of the output that moved most, one that is not finite any more first; none where none was compared."""
    return max(outputs.values(), key=_moved, default={})


def _moved(metrics: Mapping[str, Any]) -> float:
    if metrics["nonfinite"] is None:  # no row was compared
        return -1.0
    return math.inf if metrics["rel_l2"] is None else float(metrics["rel_l2"])


def feeds(count: int) -> str:
    """``1 feed``, ``2 feeds``."""
    return f"{count} feed{'' if count == 1 else 's'}"
