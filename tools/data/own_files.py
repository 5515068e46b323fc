"""Files that the tools of this folder have written to `--out`, named in its `statistics.json`."""

import json
import os
from collections.abc import Set
from pathlib import Path

from megatron_prepo.errors import UserError


def written_before(out: Path) -> set[str]:
    """Return the files of earlier calls, from the record that they keep."""
    try:
        statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
        return {"statistics.json", *statistics["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def refuse_other_files(out: Path, to_write: Set[str]) -> None:
    """Raise UserError if an output would replace a file that these tools did not write."""
    for name in sorted(to_write - written_before(out)):
        if os.path.lexists(out / name):
            raise UserError(
                f"{out / name} exists, and is not in a statistics.json of this tool; nothing was "
                "written: choose another --out, or move it away"
            )
