"""Exceptions that the command line shows as a sentence, without a stack trace."""

import functools
import sys
from collections.abc import Callable

MAX_LINE = 500
"""Characters of a message about what may be endless."""


class UserError(ValueError):
    """A wrong setting, file or model; the message names the culprit, its value and the remedy."""


class Stopped(RuntimeError):
    """The run has stopped between two steps and can go on; the message says why and from where."""

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def in_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """A `main` whose UserError becomes a line of stderr and the exit code 2."""

    @functools.wraps(main)
    def said(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return said


def one_line(text: object) -> str:
    """The text without line breaks and other control characters, cut after MAX_LINE."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..."
