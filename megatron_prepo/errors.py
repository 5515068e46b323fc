"""Exceptions that the command line shows as a sentence, without a stack trace."""

import errno
import os
import traceback
from pathlib import Path

MAX_LINE = 500
"""Characters of a message about what may be endless."""


class UserError(ValueError):
    """A wrong setting, file or model; the message names the culprit, its value and the remedy."""


class Stopped(RuntimeError):
    """The run has stopped between two steps and can go on; the message says why and from where."""

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def no_room(error: BaseException) -> str | None:
    """Return one line, with the remedy, for a write that found no room on a disk; else None."""
    if (words := full_disk(error)) is None:
        return None
    return f"{words}; make room there, and the same command resumes what is unfinished"


def full_disk(error: BaseException) -> str | None:
    """Return what an error, or one behind it, says of a disk without room; None if none does.

    Its text is looked at, since not every library that writes (safetensors, torch) raises an
    OSError of its own.
    """
    one = error
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
"""Disk full, quota, file-size limit (`ulimit -f`): as Python and C, and as Rust, write them."""


def one_line(text: object) -> str:
    """The text without line breaks and other control characters, cut after MAX_LINE."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..."
