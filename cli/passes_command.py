"""``ffnfold passes``: what passes there are and what options they take."""

from __future__ import annotations

import inspect

import click
from rich.table import Table

from ..passes.options import describe
from ..passes.registry import PASSES
from .output import console, emit


@click.command("passes")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(as_json: bool) -> None:
    """List the passes: exact or approximate, what each does, its options."""
    listed = [{"name": name, "exact": kind.exact, "summary": (inspect.getdoc(kind) or "").split("\n\n", 1)[0],
               "needs_feeds": kind().needs_feeds, "options": describe(kind)} for name, kind in sorted(PASSES.items())]
    if as_json:
        emit({"passes": listed})
        return
    table = Table("pass", "", "what it does", "options", show_lines=True)
    for each in listed:
        options = "\n".join(f"{option['name']}={option['default']}  ({option['type']})"
                            for option in each["options"])  # type: ignore[attr-defined]
        table.add_row(str(each["name"]), "exact" if each["exact"] else "approximate",
                      " ".join(str(each["summary"]).split()), options)
    console.print(table)
