"""Where results come to lie, looked at before the work that makes them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError
from .leftovers import temporary_name

_FEEDS = (".npz", ".pb")


def check_file(path: Path, what: str, inputs: Iterable[Path | None] = (), *, in_place: bool = False) -> None:
    """Check that a file can be written to ``path``: a file is made beside it, and removed.

    Args:
        what: it is, for the error.
        inputs: files that it must not overwrite, and folders of feeds; None: nothing.
        in_place: a file that is there is not replaced but written to.

    Raises:
        InputError: there is a folder, something that is no regular file, or an input; there is no folder for it; or it cannot
            be written to, such as for a name that is too long.
    """
    reason = obstacle(path)
    given = next((each for each in inputs if each is not None and _overwrites(path, each)), None)
    if reason is None and given is not None:
        reason = f"it is an input (of '{given}')" if os.path.isdir(given) else "it is an input"
    if reason is None and in_place and os.path.exists(path) and not os.access(path, os.W_OK):
        reason = "it may not be written to"
    if reason is None:
        reason = _trial(temporary_name(path))
    if reason is not None:
        raise InputError(f"{path}: {what} cannot be written there, as {reason}: choose another place")


def check_folder(folder: Path, what: str) -> None:
    """Check that ``folder`` is one that can be written into, or can be made: a file is made in it or above it, and removed.

    Raises:
        InputError: it is not.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    try:
        reason = None if os.path.isdir(there) else f"'{there}' is no folder"
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # such as a name that is too long
        reason = reason or f"it cannot be made ({error.strerror})"
    reason = reason or _trial(there / f".{secrets.token_hex(4)}.tmp")
    if reason is not None:
        raise InputError(f"{folder}: {what} cannot be written there, as {reason}: choose another folder")


def obstacle(path: Path) -> str | None:
    """What is at ``path`` and must not be replaced by a file, or what it lacks; None where a file may come to lie there."""
    if os.path.isdir(path):  # unlike Path.is_dir it does not fail on a name that is too long
        return "it is a folder"
    if (os.path.exists(path) and not os.path.isfile(path)) or _leads_to_a_process(path):
        return "it is no regular file"
    if not os.path.isdir(path.parent):
        return f"there is no folder '{path.parent}' (make it first)"
    return None


def _leads_to_a_process(path: Path) -> bool:
    """Whether it is a link such as /dev/stdout, whose place a file must not take whatever stdout is."""
    return os.path.islink(path) and os.readlink(path).startswith("/proc/")


def _overwrites(path: Path, given: Path) -> bool:
    """Whether ``path`` is the file ``given``, or a feed in the folder ``given``."""
    if not os.path.exists(path) or not os.path.exists(given):
        return False
    if os.path.isdir(given):
        return path.suffix in _FEEDS and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(given))
    return os.path.samefile(path, given)


def _trial(path: Path) -> str | None:
    """Make the file ``path``, which is not there, and remove it; why that cannot be done."""
    try:
        path.open("xb").close()
        path.unlink()
    except OSError as error:
        return f"no file can be made there ({error.strerror or error})"
    return None
