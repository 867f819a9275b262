"""What a recipe is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graph.errors import InputError

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How a sample model comes about.

    Attributes:
        name: what it is asked for by.
        description: one line.
        licence: of the weights.
        version: goes up when the recipe makes something else.
        needs_export: whether it needs the extra ``export`` (torch).
        make: writes ``model.onnx`` and ``feeds/*/*.npz`` into a folder that is there.
        sources: what it is made from, with SHA-256, and which part is for fitting, choosing, reporting.
    """

    name: str
    description: str
    licence: str
    version: int
    needs_export: bool
    make: Callable[[Path, Progress], None]
    sources: Callable[[], Mapping[str, Any]]


def require(recipe: str, packages: Sequence[str]) -> None:
    """Check that packages of the extra ``export`` are installed.

    Raises:
        InputError: one is not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"the model '{recipe}' is exported with torch, and {', '.join(missing)} is not installed: "
                         "pip install 'ffnfold[export]'")
