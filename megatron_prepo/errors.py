"""Exceptions that the command line prints as one line, without a stack trace."""

import errno
import os
import traceback
from pathlib import Path

MAX_LINE = 500
"""Maximum characters of a message that quotes text of unbounded length."""


class UserError(ValueError):
    """Invalid setting, file or model; the message names it, its value and the remedy."""


class NoSuchPath(Exception):
    """A file or folder of the command line that does not exist; the message names it.

    No ValueError, which argparse would report as wrong usage of the command.
    """


class Stopped(RuntimeError):
    """The run stopped between two steps and can be resumed; the message has the reason and step."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def no_room(error: BaseException) -> str | None:
    """Return one line, with the remedy, for a write that failed on a full disk; else None."""
    if (words := full_disk(error)) is None:
        return None
    return f"{words}; make room there, and the same command resumes what is unfinished"


def full_disk(error: BaseException) -> str | None:
    """Return the message of an error, or of a cause of it, that reports a full disk; else None.

    The text is searched, since not every library that writes (safetensors, torch) raises an
    OSError.
    """
    one: BaseException | None = error
    while one is not None:
        words = " ".join(str(one).split())
        if any(mark in words for mark in NO_ROOM):
            if isinstance(one, OSError) and one.errno and one.filename is None:
                frame = traceback.extract_tb(one.__traceback__)[-1]
                words += f" (writing in {Path(frame.filename).name}, line {frame.lineno})"
            return words
        one = one.__cause__ or one.__context__
    return None


NO_ROOM = tuple(
    mark
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    for mark in (os.strerror(number), f"(os error {number})")
)
"""Messages for disk full, quota and file-size limit (`ulimit -f`) of Python and C, and of Rust."""


def one_line(text: object) -> str:
    """Return a text without line breaks and control characters, truncated after MAX_LINE."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..."
