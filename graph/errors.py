"""The one exception that is the user's to mend."""


class InputError(Exception):
    """Bad input. ``str(error)`` is one line: what is wrong, where, and how to mend it. The command line exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # names from a file may hold line breaks
