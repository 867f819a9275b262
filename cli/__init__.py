"""The command line: thin, one file a command."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

import click

from .. import __version__

_COMMANDS = {"inspect": "Find the FFN blocks of models.", "optimize": "Rewrite a model by a plan, and verify it.",
             "search": "Find the fastest plan within limits on the drift.",
             "verify": "Measure how far a model moved from its reference.", "bench": "Time models against each other.",
             "passes": "List the passes and their options.", "models": "List and fetch sample models.",
             "demo": "Do the whole job on a real model."}
READER_GONE, INTERRUPTED = 128 + 13, 128 + 2
"""Exit codes where a signal would have ended another program: SIGPIPE and SIGINT."""


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

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _a_reader():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _a_reader():
            return super().invoke(ctx)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        from ..graph.errors import BrokenByPass, InputError

        for stream in (sys.stdout, sys.stderr):  # names of files and values hold any character, terminals do not
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except InputError as error:
            _leave(f"ffnfold: {error}")
        except BrokenByPass as error:
            _leave(f"ffnfold: {error}: nothing was written; leave that pass out, and report it if the model runs")
        except click.ClickException as error:
            _leave(_usage(error))
        except click.Abort:
            _leave("ffnfold: interrupted", INTERRUPTED)
        except OSError as error:
            where = "the output" if error.filename is None else " ".join(str(error.filename).split())
            _leave(f"ffnfold: {where}: cannot be read or written ({error.strerror or error}): check the path, its permissions "
                   "and the room on the disk")
        except MemoryError:
            _leave("ffnfold: out of memory: use a machine with more, or fewer feeds")
        if kwargs.get("standalone_mode", True):
            sys.exit(code)
        return code


def _usage(error: click.ClickException) -> str:
    """What is wrong with how a command was called, in one line; the help where a command was called with nothing."""
    context = getattr(error, "ctx", None)
    if context is None:
        return f"ffnfold: {error.format_message()}"
    if context.command.no_args_is_help and error.format_message() == context.get_help():
        return str(error.format_message())
    text = " ".join(error.format_message().split()).rstrip(".")
    return f"{context.command_path}: {text} (see {context.command_path} --help)"


def _leave(text: str, code: int = 2) -> NoReturn:
    """Say why on stderr, if anyone still reads it, and end."""
    with contextlib.suppress(BrokenPipeError, click.exceptions.Exit), _a_reader():
        click.echo(text, err=True)
    sys.exit(code)


@contextlib.contextmanager
def _a_reader() -> Iterator[None]:
    """Where whoever reads stdout or stderr went away, the command ends as others do that SIGPIPE ends, with nothing said."""
    try:
        yield
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            _let_go(stream)
        raise click.exceptions.Exit(READER_GONE) from None


def _let_go(stream: TextIO) -> None:
    """What is still in the buffer of a stream that nobody reads goes nowhere when Python ends."""
    try:
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@click.command("ffnfold", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Rewrite the feed-forward blocks of an exported ONNX transformer, and prove what it cost and gained."""
