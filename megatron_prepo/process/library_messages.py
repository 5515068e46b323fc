"""Messages of libraries on the terminal: what only their programmers can act on is not shown.

That is what they report as deprecated, and the advice in ADVICE.  Other warnings of libraries, and
all warnings of the user's code, are shown as usual; `python -W` and PYTHONWARNINGS show all.
"""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TextIO

ADVICE = (
    # `actor.model.describe` logs once what is used in place of missing packages
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "Please use DTensor instead",
    "Overwriting old incomplete / corrupted checkpoint",  # written aside, and renamed if complete
)
"""Beginnings of messages, as regular expressions."""
FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
DEPRECATED = re.compile(r"deprecat|will be removed", re.IGNORECASE)
PACKAGES = Path(__file__).resolve().parents[2]
LIBRARIES = ("site-packages", "dist-packages", f"python{sys.version_info[0]}.{sys.version_info[1]}")
"""Folders of libraries: packages and the standard library."""

_shown_before = warnings.showwarning


def install() -> None:
    """Show from now on only warnings that a user can act on."""
    if sys.warnoptions:
        return
    for advice in ADVICE:
        warnings.filterwarnings("ignore", message=advice)
    warnings.showwarning = show
    assert logging.lastResort is not None, "the handler of loggers without one"
    logging.lastResort.addFilter(is_for_users)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as usual, unless it is a library's and only its programmers can act on it."""
    outdated = issubclass(category, FOR_PROGRAMMERS) or DEPRECATED.search(str(message))
    if not (outdated and is_library(filename)):
        _shown_before(message, category, filename, lineno, file, line)


def is_library(filename: str) -> bool:
    """Return whether code is of a library, or ours, which calls it; not a user's file."""
    path = Path(filename).resolve()
    ours = (PACKAGES / name for name in ("megatron_prepo", "checkpoints_convert"))
    if any(path.is_relative_to(folder) for folder in ours):
        return True
    return not path.is_file() or any(name in path.parts for name in LIBRARIES)


def is_for_users(record: logging.LogRecord) -> bool:
    """Return whether a message of a logger without a handler is shown."""
    text = record.getMessage()
    known = any(re.match(advice, text) for advice in ADVICE) or DEPRECATED.search(text)
    return record.levelno > logging.WARNING or not known
