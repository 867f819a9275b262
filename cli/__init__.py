"""The command line: thin, one file a command."""

from __future__ import annotations

import importlib
import io
import sys
from typing import Any

import click

from .. import __version__

_COMMANDS = {"inspect": "Find the FFN blocks of models.", "optimize": "Rewrite a model by a plan, and verify it.",
             "search": "Find the fastest plan within limits on the drift.",
             "verify": "Measure how far a model moved from its reference.", "bench": "Time models against each other.",
             "passes": "List the passes and their options.", "models": "List and fetch sample models.",
             "demo": "Do the whole job on a real model."}


class _Commands(click.Group):
    """Commands that are imported when they are used, so that ``inspect`` does not wait for ONNX Runtime."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name}_command", __name__).command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        from ..graph.errors import BrokenByPass, InputError

        for stream in (sys.stdout, sys.stderr):  # names of files and values hold any character, terminals do not
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except InputError as error:
            click.echo(f"ffnfold: {' '.join(str(error).split())}", err=True)
            sys.exit(2)
        except BrokenByPass as error:
            click.echo(f"ffnfold: {' '.join(str(error).split())}: nothing was written; leave that pass out, and report it if the "
                       "model runs", err=True)
            sys.exit(2)
        except BrokenPipeError:
            sys.exit(0)
        except MemoryError:
            click.echo("ffnfold: out of memory: use a machine with more, or fewer feeds", err=True)
            sys.exit(2)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Rewrite the feed-forward blocks of an exported ONNX transformer, and prove what it cost and gained."""
