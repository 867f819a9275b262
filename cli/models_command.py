"""``ffnfold models``: sample models to try things on."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from .. import models
from .options import PATH
from .output import console, emit, progress, say


@click.group("models")
def command() -> None:
    """List and fetch sample models, with real inputs for fitting, choosing and reporting."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def list_models(as_json: bool) -> None:
    """What there is."""
    listed = [{"name": recipe.name, "description": recipe.description, "licence": recipe.licence,
               "needs_export": recipe.needs_export} for recipe in models.RECIPES.values()]
    if as_json:
        emit({"models": listed})
        return
    table = Table("name", "what it is", "licence", "needs")
    for each in listed:
        table.add_row(str(each["name"]), str(each["description"]), str(each["licence"]),
                      "ffnfold[export]" if each["needs_export"] else "a download")
    console.print(table)


@command.command("get")
@click.argument("name")
@click.option("-o", "--output", type=PATH, metavar="DIR", help="Where to put it; default ./NAME.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def get_model(name: str, output: Path | None, as_json: bool) -> None:
    """Fetch or build the model NAME."""
    folder = output or Path(name)
    with progress(as_json) as tell:
        path = models.get(name, folder, tell)
    if as_json:
        emit({"name": name, "model": str(path), "feeds": str(folder / "feeds")})
    else:
        say(f"{path}, inputs in {folder / 'feeds'}")
