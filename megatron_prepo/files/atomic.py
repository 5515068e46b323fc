"""Files that are whole or absent: write aside, force to disk, rename.

Those that grow by lines may end in the middle of one.
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
    """Replace a file by new text; a reader sees the old or the new one, never a part."""
    path = Path(path)
    # a name that is nobody's: a file of the user's may be called NAME.partial
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
    """Give a finished directory its name, after all that is in it has reached the disk."""
    aside = Path(aside)
    for path in aside.rglob("*"):
        if path.name != lock.FILE:  # to close it would release the lock
            flush(path)
    flush(aside)
    aside.rename(final)
    flush(Path(final).parent)


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line that has no end yet is left out.

    Raises UserError that names a line which is damaged.
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
    """Write to the end of an open file; on disk when this returns."""
    with naming(file.name):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError of a write, which has no file of its own (disk full), the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
