"""How commands speak: tables and progress for people on a terminal, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console

_WIDTH_OF_A_PIPE = 120


class _Console(Console):
    """One that raises the error of a closed pipe, so that the command line says what it means."""

    def on_broken_pipe(self) -> None:
        raise


console = _Console(highlight=False, markup=False, emoji=False,  # names of values may hold brackets and colons
                  width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_A_PIPE)


def say(text: str, style: str | None = None) -> None:
    """A line for people, not cut to the width of the terminal."""
    console.print(text, style=style, soft_wrap=True)


def emit(value: object) -> None:
    """One JSON object on one line. Not-a-number and infinities become null: JSON has none."""
    click.echo(json.dumps(plain(value)))  # in ASCII, which every terminal and pipe can take


def plain(value: Any) -> Any:
    """``value`` with what JSON lacks replaced by null."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Gives a function that shows what is going on; silent in a pipe and with ``quiet``."""
    if quiet or not sys.stderr.isatty():
        yield lambda message: None
        return
    with Console(stderr=True, markup=False, emoji=False).status("…") as status:
        yield lambda message: status.update(message)


def placement(found: dict[str, Any]) -> str:
    """Where nodes ran, for people."""
    nodes = ", ".join(f"{name.removesuffix('ExecutionProvider')} {count}"
                      for name, count in (found["nodes_by_provider"] or {}).items())
    copies = f", {found['memcpy_nodes']} copies" if found["memcpy_nodes"] else ""
    fallen = f", {len(found['fallback_nodes'])} that compute on the CPU" if found["fallback_nodes"] else ""
    return f"{nodes}{copies}{fallen}"


def megabytes(count: int) -> str:
    """``count`` bytes for people."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
