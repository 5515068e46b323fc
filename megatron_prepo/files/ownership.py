"""Ownership of folders: nothing is removed or replaced without proof that this program wrote it.

Every folder that we create first gets a marker, `.megatron-prepo.json`: the kind of the folder, for
a run its identity, and for a folder within a run's directory the identity of that run.  When its
content is complete it is sealed: the marker then lists every file with a proof of its content.  So

- a folder without a marker is the user's, whatever its name;
- a folder that another run wrote is not this run's;
- in a sealed folder, a file that is not listed, or that was replaced, is the user's;
- a `.partial` folder with a marker was left by a killed process;
- any other folder without a list, or with a list of names only (older versions), proves nothing.

The proof is the SHA-256 of a file up to 64 MiB.  For a larger file it is a digest of samples
(`digest.py`: size, both ends and 32 blocks in between) and the time of the last change, to the
nanosecond: reading all of it again would take as long as writing it, other weights of the same
shapes differ in the samples, and a change between the samples has another time.

A link is never ours, and its target is never touched.  The marker records no path, so a folder that
was moved or copied is still recognised; copies of files above 64 MiB only if their times were
copied, too (`mv`, `cp -a`, `rsync -a`).  `lock.py` keeps two processes out of one folder,
`run/directory.py` lists the files that a run writes.
"""

import argparse
import itertools
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError
from megatron_prepo.files import lock
from megatron_prepo.files.atomic import flush, rename_tree, write_text
from megatron_prepo.files.digest import digest, is_sampled

MARKER = ".megatron-prepo.json"
MADE_BY = "megatron-prepo"
RUN = "run"
"""The kind of a run's directory."""
UNFINISHED = "unfinished folder"
NOT_CONTENT = (MARKER, lock.FILE)
"""Files that mark or lock a folder and are not part of its content."""
MAX_MARKER_BYTES = 1 << 26
LATER_LOG = re.compile(r"logs/rank_\d+\.(log|error)")
LATER_FOLDER = re.compile(r"(one_rank/gradients_\d+)/.+")
LATER_KIND = "gradients"
"""Additions of a replay to a sealed dump: logs, and folders with their own seals."""


def begin(final: str | Path) -> Path:
    """Make and lock the folder `FINAL.partial`, in which the content of `final` is prepared.

    A folder left by a killed process is replaced.  Raises UserError if a live process writes it.
    """
    final = Path(final)
    aside = final.with_name(final.name + ".partial")
    make_room(aside, UNFINISHED, run_identity(aside))
    create(aside, UNFINISHED)
    lock.take(aside / lock.FILE, str(final))
    return aside


def publish(aside: Path, final: str | Path, kind: str | None) -> None:
    """Give the complete folder its name, on disk; `make_room` handles an existing one.

    Without a kind the folder gets no marker: it is then the user's.  Raises UserError if the folder
    that `begin` created was moved, removed or replaced.
    """
    if not lock.is_held(aside / lock.FILE):
        raise UserError(
            f"{aside} was moved, removed or replaced while it was being written; {final} was not "
            "touched: start the same command again"
        )
    if kind:
        seal(aside, kind)
    make_room(final, kind, run_identity(final))
    rename_tree(aside, final)
    lock.give_back(aside / lock.FILE)
    for name in NOT_CONTENT if kind is None else (lock.FILE,):
        Path(final, name).unlink(missing_ok=True)


def abandon(aside: Path) -> None:
    """Remove the folder that this process began, but not another one in its place."""
    if lock.is_held(aside / lock.FILE):
        lock.give_back(aside / lock.FILE)
        shutil.rmtree(aside, ignore_errors=True)


def create(directory: str | Path, kind: str) -> None:
    """Create a folder with a marker; UserError if another process has just created it."""
    try:
        Path(directory).mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{directory} has just been made by another process") from error
    mark(directory, kind, run=run_identity(directory))


def mark(directory: str | Path, kind: str, **facts: object) -> None:
    """Write or replace the marker of a folder that is ours, or has no files with our names."""
    content = {"made_by": MADE_BY, "kind": kind, **facts}
    write_text(Path(directory) / MARKER, json.dumps(content, indent=1) + "\n")


def new_identity() -> str:
    """Return a random name that no other run has."""
    return secrets.token_hex(16)


def marker(directory: str | Path) -> dict[str, Any] | None:
    """Return the content of a folder's marker; None if it is missing or not in our format."""
    path = Path(directory) / MARKER
    try:
        if path.stat().st_size > MAX_MARKER_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
        return None
    kind, identity = content.get("kind"), content.get("identity")
    if kind == RUN and not (isinstance(identity, str) and identity.isalnum()):
        return None
    return content if isinstance(kind, str) else None


def run_identity(path: str | Path) -> str | None:
    """Return the identity of the run whose directory contains the path; None if there is none."""
    for parent in Path(os.path.abspath(path)).parents:
        content = marker(parent)
        if content is not None and content["kind"] == RUN:
            return str(content["identity"])
    return None


def seal(directory: str | Path, kind: str) -> None:
    """Mark the folder as complete: list all files in the marker, each with its proof.

    Files that are added or replaced later are not ours.
    """
    directory = Path(directory)
    files = {name: _proof(directory / name) for name in sorted(_content(directory))}
    mark(directory, kind, run=run_identity(directory), files=files)


def is_marked(directory: str | Path, kind: str | None, run: str | None = None) -> bool:
    """Return whether a folder (not a link) has our marker of that kind and that run."""
    directory = Path(directory)
    content = None if directory.is_symlink() or not directory.is_dir() else marker(directory)
    if content is None or content["kind"] != kind:
        return False
    return run is None or content.get("run") in (None, run)  # older versions recorded no run


def strangers(directory: str | Path, kind: str | None, run: str | None = None) -> list[Path]:
    """Return the paths in a folder of that kind, and with `run` of that run, that are not ours.

    The folder itself if nothing in it is known to be ours.
    """
    directory = Path(directory)
    if not is_marked(directory, kind, run):
        return [directory]
    if kind == UNFINISHED:
        return []
    content = marker(directory)
    assert content is not None, f"{directory} is marked"
    proofs = content.get("files")
    # never completed, written by a version that listed names only, or sealed outside of any run
    if not isinstance(proofs, dict) or (run is not None and content.get("run") != run):
        return [directory]
    found = [
        name
        for name in sorted(_content(directory))
        if not _is_as_sealed(directory / name, proofs.get(name)) and not LATER_LOG.fullmatch(name)
    ]
    later = {within[1] for name in found if (within := LATER_FOLDER.fullmatch(name))}
    later = {name for name in later if not strangers(directory / name, LATER_KIND, run)}
    return [
        directory / name
        for name in found
        if not ((within := LATER_FOLDER.fullmatch(name)) and within[1] in later)
    ]


def make_room(path: str | Path, kind: str | None, run: str | None = None) -> None:
    """Leave nothing at `path`: remove our folder of that kind, rename anything else and log it.

    With `run`, another run's folder is not ours.  Raises UserError if a live process is writing it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()
        return
    if strangers(path, kind, run):
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


def new_file(*beside: str) -> Callable[[str], Path]:
    """Return the argparse type of an option that names a file to write, which must not exist.

    `beside`: suffixes of further files that are written under its name.  Nothing in such a file
    would show that it is ours.
    """

    def new_path(name: str) -> Path:
        path = Path(name)
        for file in (path, *(path.with_suffix(suffix) for suffix in beside)):
            if os.path.lexists(file):
                raise argparse.ArgumentTypeError(f"{file} exists; choose another, or move it away")
        return path

    return new_path


def earlier_result(path: str | Path, keys: Iterable[str]) -> dict[str, Any] | None:
    """Return the JSON object with just these keys that an earlier call wrote; None without a file.

    Raises UserError for anything else: the file is not one to replace.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result.keys() == set(keys):
            return result
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    raise UserError(
        f"{path} exists, and is not a result of this command; choose another, or move it away"
    )


def _content(directory: Path) -> set[str]:
    """Return relative names of all files and links below a folder, except NOT_CONTENT."""
    found = {
        Path(parent, name).relative_to(directory).as_posix()
        for parent, folders, files in os.walk(directory)
        for name in (*files, *(f for f in folders if Path(parent, f).is_symlink()))
    }
    return found - set(NOT_CONTENT)


def _proof(path: Path) -> dict[str, object] | None:
    """Return the proof of a file's content; None if it is not a regular file, such as a link."""
    if path.is_symlink() or not path.is_file():
        return None
    content = digest(path)
    proof: dict[str, object] = {"bytes": path.stat().st_size, "digest": content}
    if is_sampled(content):
        flush(path)  # fixes the time of the last change on a network file system
        proof["mtime_ns"] = path.stat().st_mtime_ns
    return proof


def _is_as_sealed(path: Path, proof: object) -> bool:
    """Return whether a file is as it was sealed; size and time are compared first."""
    if not isinstance(proof, dict) or path.is_symlink() or not path.is_file():
        return False
    found = path.stat()
    size, time = proof.get("bytes"), proof.get("mtime_ns", found.st_mtime_ns)
    return (size, time) == (found.st_size, found.st_mtime_ns) and _proof(path) == proof
