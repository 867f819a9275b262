"""The folder that ``--report`` names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from ..graph.errors import InputError
from ..graph.places import check_file, check_folder
from .output import plain
from .page import Report, missing_library, render

_FILES = ("report.html", "report.json", "report.md", "plan.yaml", "details.json")


def check_report(folder: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Check before the work that a report can be written into ``folder``, which need not be there yet.

    Args:
        inputs: files that it must not overwrite.

    Raises:
        InputError: it is a file, it or one of the report's files in it cannot be written to, or one of them is an input.
    """
    check_folder(folder, "the report")
    if folder.is_dir():
        for name in _FILES:
            check_file(folder / name, "the report", inputs, in_place=True)


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
