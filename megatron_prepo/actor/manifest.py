"""Manifest of a checkpoint: size and SHA-256 of every file, to recognise a complete checkpoint.

Reading is split between the ranks; all can access the directory, as Megatron's checkpoints require.
"""

import hashlib
import json
from pathlib import Path

import torch.distributed as dist

from megatron_prepo.actor import parallel
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import write_text

MANIFEST = "manifest.json"
BLOCK = 1 << 20
Entry = dict[str, int | str]
"""Type of a file's entry: its size and checksum."""


def write(directory: Path, known: dict[str, Entry]) -> None:
    """Write the manifest of all files in a directory; collective.

    `known` has the entries (`file_entry`) that this rank already computed.
    """
    files = {
        name: entry for share in parallel.gather_to_all(known) for name, entry in share.items()
    }
    other = {*files, MANIFEST, *ownership.NOT_CONTENT}
    rest = (path for path in directory.iterdir() if path.name not in other)
    files |= _summed(sorted(rest))
    if dist.get_rank() == 0:
        write_text(
            directory / MANIFEST,
            json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n",
        )


def is_complete(directory: Path) -> bool:
    """Return whether every file of the manifest exists with its size.

    No other file is read, so that one process can call it; `problem` compares the content.
    """
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: entry["bytes"] for name, entry in files.items()}
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def problem(directory: Path) -> str | None:
    """Return why a checkpoint is not complete, as a phrase, or None if it is; collective."""
    text = parallel.from_rank_zero(_text(directory))
    if text is None:
        return "has no manifest"
    try:
        expected = dict(json.loads(text)["files"])
    except (ValueError, KeyError, TypeError):
        return "has a damaged manifest"
    missing = [name for name in expected if not (directory / name).is_file()]
    if missing := parallel.from_rank_zero(missing):
        return f"lacks {missing[0]}"
    found = _summed([directory / name for name in sorted(expected)])
    changed = [name for name in sorted(expected) if found[name] != expected[name]]
    return f"has a damaged {changed[0]}" if changed else None


def _text(directory: Path) -> str | None:
    try:
        return (directory / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _summed(paths: list[Path]) -> dict[str, Entry]:
    """Return size and SHA-256 by name, on every rank."""
    mine = paths[dist.get_rank() :: dist.get_world_size()]
    shares = parallel.gather_to_all({path.name: file_entry(path) for path in mine})
    return {name: entry for share in shares for name, entry in share.items()}


def file_entry(path: Path) -> Entry:
    """Return size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
