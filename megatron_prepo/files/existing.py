"""Files and folders that a command line names and a command reads.

An absent one is reported while the command line is parsed, before anything else is asked for.
"""

from collections.abc import Callable
from pathlib import Path

from megatron_prepo.errors import NoSuchPath


def existing(what: str = "file or folder") -> Callable[[str], Path]:
    """Return the argparse type of an argument that names something to read.

    `what` names it in the message of NoSuchPath, which is raised if nothing is there.
    """

    def existing_path(word: str) -> Path:
        path = Path(word)
        if not path.exists():
            raise NoSuchPath(f"no such {what}: {word}")
        return path

    return existing_path
