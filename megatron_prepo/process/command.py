"""What all commands share: exit codes, errors in one line, no silence, no noise of libraries."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_prepo import internals
from megatron_prepo.errors import NoSuchPath, UserError, no_room
from megatron_prepo.process import activity
from megatron_prepo.process.progress import no_bars_in_logs

INTERRUPTED = "interrupted; the same command starts again, and resumes what it has saved"


def in_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap `main`: a UserError becomes one line on stderr and exit code 2, a full disk exit code 1.

    NoSuchPath is treated as a UserError.

    An import that fails because a library changed (`internals.py`) is treated as a UserError.
    Ctrl-C becomes a line and exit code 130.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        _open_streams()
        no_bars_in_logs()
        try:
            with activity.shown("loading the libraries"):
                return main(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            print(interrupt.args[0] if interrupt.args else INTERRUPTED, file=sys.stderr)
            return 130
        except (UserError, NoSuchPath) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except ImportError as error:
            if (changed := internals.explain(error)) is None:
                raise
            print(f"error: {changed}", file=sys.stderr)
            return 2
        except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            if error.filename is None:
                raise
            print(
                f"error: {error.filename}: {error.strerror}; choose another path, or move or fix "
                "the existing file",
                file=sys.stderr,
            )
            return 2
        except Exception as error:
            if (line := no_room(error)) is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            return 1

    return run


def _open_streams() -> None:
    """Open /dev/null for standard streams that are closed (`>&-`).

    Otherwise the next file to be opened would get their descriptor, and a child's output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if vars(sys)[name] is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            stream = open(number, "r" if number == 0 else "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
