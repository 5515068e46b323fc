"""Read the JSON Lines files that a run appends to, also those of a run that was killed."""

import json
import warnings
from pathlib import Path

from megatron_prepo.errors import UserError


def read(path: str | Path) -> list[dict]:
    """The objects of a file, in order.

    A torn last line, whose writer was killed within it, is left out with a warning.  Raises
    UserError for any other line that is no JSON object.
    """
    *whole, last = Path(path).read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(whole, 1):
        if (value := _object(line)) is None:
            raise UserError(f"{path}, line {number} is damaged: no JSON object")
        objects.append(value)
    if last:
        if (value := _object(last)) is None:
            warnings.warn(f"{path}: the last line is torn, and left out", stacklevel=2)
        else:
            objects.append(value)
    return objects


def _object(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
