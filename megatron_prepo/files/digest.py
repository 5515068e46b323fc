"""Digests of files' content.

- up to 64 MiB: SHA-256 of the complete content;
- a larger file (weights): SHA-256 of its size, its first MiB, its last MiB and 32 blocks of 64 KiB
  spread evenly.  A change that spans a 32nd of the file is detected, a change within a gap is not.
"""

import hashlib
from pathlib import Path

FULL_BYTES = 64 << 20
END_BYTES = 1 << 20
NUM_BLOCKS, BLOCK_BYTES = 32, 64 << 10


def digest(file: Path) -> str:
    """Return a file's digest: `sha256:` of its complete content, `sampled:` for a larger file."""
    size = file.stat().st_size
    with open(file, "rb") as content:
        if size <= FULL_BYTES:
            summed = hashlib.sha256()
            while block := content.read(END_BYTES):
                summed.update(block)
            return f"sha256:{summed.hexdigest()}"
        summed = hashlib.sha256(f"{size}\n".encode())
        summed.update(content.read(END_BYTES))
        for i in range(1, NUM_BLOCKS + 1):
            content.seek(i * size // (NUM_BLOCKS + 1))
            summed.update(content.read(BLOCK_BYTES))
        content.seek(size - END_BYTES)
        summed.update(content.read(END_BYTES))
    return f"sampled:{summed.hexdigest()}"


def is_sampled(digest: str) -> bool:
    """Return whether a digest is of samples, and so insensitive to a change within a gap."""
    return digest.startswith("sampled:")
