"""``ffnfold inspect``: what FFN blocks a model has."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.table import Column, Table

from ..graph.errors import InputError
from ..graph.report import describe
from .options import PATH
from .output import console, emit, say


@click.command("inspect")
@click.argument("models", nargs=-1, required=True, type=PATH, metavar="MODEL...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a model, a line each.")
@click.option("--explain", is_flag=True, help="Also what looks like an FFN block and is not, and why.")
def command(models: tuple[Path, ...], as_json: bool, explain: bool) -> None:
    """Find the FFN blocks of each MODEL, whatever exported it.

    Exit code 2 if a file could not be read; the others are reported all the same.
    """
    failed = False
    for path in models:
        try:
            description = describe(path)
        except InputError as error:
            failed = True
            text = " ".join(str(error).split())
            if as_json:
                emit({"model": str(path), "error": text})
            click.echo(f"ffnfold: {text}", err=True)
            continue
        if as_json:
            emit(description)
        else:
            _show(description, explain)
    if failed:
        sys.exit(2)


def _show(description: dict[str, object], explain: bool) -> None:
    blocks: list[dict[str, object]] = description["ffn_blocks"]  # type: ignore[assignment]
    say(str(description["model"]), style="bold")
    say(f"opset {description['opset']}, {description['nodes']} nodes, {description['parameters']:,} parameters"
        + (f", {description['producer']}" if description["producer"] else ""))
    if not blocks:
        say("no FFN block found" + ("" if explain else " (--explain says what was looked at)"))
    else:
        table = Table("block", Column("name", overflow="fold"), "shape", "activation", "bias", "parameters", "notes")
        for block in blocks:
            table.add_row(str(block["index"]), str(block["name"]), _shape(block), _activation(block), _bias(block),
                          f"{block['parameters']:,}", _notes(block))
        console.print(table)
    rejected: list[dict[str, str]] = description["rejected"]  # type: ignore[assignment]
    if explain and rejected:
        table = Table(Column("not an FFN block", overflow="fold"), "because")
        for each in rejected:
            table.add_row(each["value"], each["reason"])
        console.print(table)


def _shape(block: dict[str, object]) -> str:
    out = "" if block["d_out"] == block["d_model"] else f"→{block['d_out']}"
    return f"{block['d_model']}→{block['d_ff']}{out}"


def _activation(block: dict[str, object]) -> str:
    return f"{block['activation']}{', gated' if block['gated'] else ''}"


def _bias(block: dict[str, object]) -> str:
    return "+".join(name for name, key in (("up", "up_bias"), ("down", "down_bias")) if block[key]) or "none"


def _notes(block: dict[str, object]) -> str:
    notes = []
    if block["graph"] != "main":
        notes.append(f"in {block['graph']}")
    if block["parallel"]:
        notes.append("parallel to attention")
    if block["experts"] != 1:
        notes.append(f"{block['experts']} experts")
    if block["shares_weights_with"] is not None:
        notes.append(f"weights of block {block['shares_weights_with']}")
    return ", ".join(notes)
