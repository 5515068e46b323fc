"""Whose a folder is: nothing is removed or replaced without a proof that this program made it.

A folder of ours gets a marker, `.megatron-prepo.json`, before anything else is in it: what kind of
folder it is, and for a run its identity.  When its content is complete it is sealed: the marker
then lists every file.  So

- a folder without a marker is the user's, whatever its name;
- a sealed folder that holds more than its list holds something of the user's;
- a folder with a marker and no list is one that a killed process left behind.

A link is never ours, and what it points to is never touched.  The marker names no place, so a
folder that was moved or copied is still known.  `lock.py` keeps two processes from one folder,
`run/directory.py` knows what a run writes.
"""

import itertools
import json
import os
import re
import secrets
import shutil
import sys
from pathlib import Path

from megatron_prepo.errors import UserError
from megatron_prepo.files import lock
from megatron_prepo.files.atomic import rename_tree, write_text

MARKER = ".megatron-prepo.json"
MADE_BY = "megatron-prepo"
UNFINISHED = "unfinished folder"
NOT_CONTENT = (MARKER, lock.FILE)
"""Files that say whose a folder is, and are no part of what it holds."""
MAX_MARKER_BYTES = 1 << 26
LATER = re.compile(r"logs/rank_\d+\.(log|error)|one_rank/gradients_\d+/[^/]+")
"""What a replay adds to a dump that was sealed before."""


def begin(final: str | Path) -> Path:
    """Make and lock the folder `FINAL.partial`, in which the content of `final` is prepared.

    One that a killed process left is replaced; UserError if a running one is writing it.
    """
    final = Path(final)
    aside = final.with_name(final.name + ".partial")
    make_room(aside, UNFINISHED)
    create(aside, UNFINISHED)
    lock.take(aside / lock.FILE, str(final))
    return aside


def publish(aside: Path, final: str | Path, kind: str | None) -> None:
    """Give the complete folder its name, on disk; what had it goes as in `make_room`.

    Without a kind it is the user's from then on, and has no marker.
    """
    if kind:
        seal(aside, kind)
    make_room(final, kind)
    rename_tree(aside, final)
    lock.give_back(aside / lock.FILE)
    for name in NOT_CONTENT if kind is None else (lock.FILE,):
        Path(final, name).unlink(missing_ok=True)


def abandon(aside: Path) -> None:
    """Remove what this process began."""
    lock.give_back(aside / lock.FILE)
    shutil.rmtree(aside, ignore_errors=True)


def create(directory: str | Path, kind: str) -> None:
    """Make a folder with a marker; UserError if another process was faster."""
    try:
        Path(directory).mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{directory} has just been made by another process") from error
    mark(directory, kind)


def mark(directory: str | Path, kind: str, **facts: object) -> None:
    """Write or replace the marker of a folder that is known to be ours, or empty of our names."""
    content = {"made_by": MADE_BY, "kind": kind, **facts}
    write_text(Path(directory) / MARKER, json.dumps(content, indent=1) + "\n")


def new_identity() -> str:
    """A name that no other run has."""
    return secrets.token_hex(16)


def marker(directory: str | Path) -> dict | None:
    """The content of a folder's marker; None without one in our form."""
    path = Path(directory) / MARKER
    try:
        if path.stat().st_size > MAX_MARKER_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
        return None
    right = isinstance(content.get("kind"), str) and isinstance(content.get("files", []), list)
    return content if right else None


def seal(directory: str | Path, kind: str) -> None:
    """List all files in the marker: the folder is complete, and what comes to it is not ours."""
    directory = Path(directory)
    mark(directory, kind, files=sorted(_files(directory) - set(NOT_CONTENT)))


def strangers(directory: str | Path, kind: str | None) -> list[Path]:
    """Paths in a folder of that kind which are not ours; the folder itself without our marker."""
    directory = Path(directory)
    content = None if directory.is_symlink() or not directory.is_dir() else marker(directory)
    if content is None or content["kind"] != kind:
        return [directory]
    if "files" not in content:
        return []
    more = _files(directory) - {*NOT_CONTENT, *content["files"]}
    return [directory / name for name in sorted(more) if not LATER.fullmatch(name)]


def make_room(path: str | Path, kind: str | None) -> None:
    """Leave nothing at `path`: remove our folder of that kind, rename anything else and log it.

    Raises UserError if a process that still runs is writing it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()
        return
    if strangers(path, kind):
        names = (path.with_name(f"{path.name}.kept-{n}") for n in itertools.count(1))
        kept = next(name for name in names if not os.path.lexists(name))
        path.rename(kept)
        print(
            f"{path} is not known to be written by this program: renamed to {kept.name}",
            file=sys.stderr,
        )
        return
    lock.refuse_if_held(path / lock.FILE, str(path))
    shutil.rmtree(path)


def claim(directory: str | Path, kind: str, option: str) -> None:
    """Mark a folder for a command's results, unless it is marked for that already.

    Raises UserError, before anything is written, if the folder holds anything else.
    """
    directory = Path(directory)
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"{option} {directory} is not a directory; choose another")
    content = marker(directory) if directory.is_dir() else None
    if content and content["kind"] == kind:
        return
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{option} {directory} exists, is not empty, and has no {MARKER} of a {kind}; nothing "
            "in it was touched: choose another directory, or empty this one"
        )
    directory.mkdir(parents=True, exist_ok=True)
    mark(directory, kind)


def _files(directory: Path) -> set[str]:
    """All that is below but real folders, by relative name; links are not followed."""
    return {
        Path(parent, name).relative_to(directory).as_posix()
        for parent, folders, files in os.walk(directory)
        for name in (*files, *(f for f in folders if Path(parent, f).is_symlink()))
    }
