"""Files that are complete or absent: written to a temporary file, forced to disk, renamed.

Files to which lines are appended may end with an incomplete line.
"""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_prepo.errors import UserError
from megatron_prepo.files import lock


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by new text; a reader sees the old or the new text, never a part."""
    path = Path(path)
    # a random name, since the user may have a file called NAME.partial
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming(aside), open(aside, "x", encoding="utf-8") as file:
            file.write(text)
        flush(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def rename_tree(aside: str | Path, final: str | Path) -> None:
    """Rename a finished directory after its contents have been forced to disk."""
    aside = Path(aside)
    for path in aside.rglob("*"):
        if path.name != lock.FILE:  # closing it would release the lock
            flush(path)
    flush(aside)
    aside.rename(final)
    flush(Path(final).parent)


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; an incomplete last line is skipped.

    Raises UserError that names a damaged line.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {number} is damaged: no JSON") from error


def flush(path: str | Path, dir_fd: int | None = None) -> None:
    """Force a file or a directory's entries to disk; `dir_fd` as in `os.open`."""
    descriptor = os.open(path, os.O_RDONLY, dir_fd=dir_fd)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(file: TextIO, text: str) -> None:
    """Append text to an open file and force it to disk."""
    with naming(file.name):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the file's name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
