"""The folder that ``--report`` names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..graph.errors import InputError
from .output import plain
from .page import Report, missing_library, render


def check_folder(folder: Path) -> None:
    """Check before the work that a report can be written into ``folder``, which need not be there yet.

    Raises:
        InputError: it is a file, or its place cannot be written to.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "cannot be written to" if there.is_dir() else "is a file"
        raise InputError(f"{folder}: the report cannot be written, as '{there}' {what}: choose another folder")


def write_folder(folder: Path, result: Mapping[str, Any], page: Report, *, details: Mapping[str, Any] | None = None,
                 texts: Mapping[str, str] | None = None) -> None:
    """Write a report into ``folder`` (made if need be). Without the libraries of the page there is none; stderr says so.

    Args:
        result: what ``--json`` prints, for ``report.json``.
        page: for ``report.html``.
        details: what the page is drawn from beside that, for ``details.json``.
        texts: other files, by name.

    Raises:
        InputError: it cannot be written there.
    """
    files = {"report.json": _json(result), **(texts or {})}
    if details:
        files["details.json"] = _json(details)
    missing = missing_library()
    if missing is None:
        files["report.html"] = render(page)
    else:
        click.echo(f"ffnfold: {missing}", err=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{folder}: the report cannot be written ({error.strerror}): choose another folder") from None


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(plain(value), indent=2) + "\n"
