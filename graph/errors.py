"""The exception that is the user's to mend, and the one that is ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike

_LONGEST = 2000  # characters


class InputError(Exception):
    """Bad input. ``str(error)`` is one line: what is wrong, where, and how to mend it. The command line exits with 2."""

    def __init__(self, message: str) -> None:
        text = " ".join(message.splitlines())  # names from a file may hold line breaks, and be of any length
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST // 2]} … {text[-_LONGEST // 2:]}")


@contextlib.contextmanager
def about(path: str | PathLike[str], *others: str | PathLike[str]) -> Iterator[None]:
    """What goes wrong here is said of the file ``path``, unless it is said of that, or of one of ``others``, already."""
    try:
        yield
    except InputError as error:
        if any(str(each) in str(error) for each in (path, *others)):
            raise
        raise InputError(f"{path}: {error}") from None


class BrokenByPass(Exception):
    """A pass made a model that is not valid, and nothing was written: a fault of ours, or the model was broken before in a way
    that nobody saw. The message, one line, names the pass and what is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))
