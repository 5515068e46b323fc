"""Exit codes of commands: a UserError becomes one line on stderr and exit code 2."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from megatron_prepo import internals
from megatron_prepo.errors import NoSuchPath, UserError, no_room


def in_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap `main`: a UserError becomes one line on stderr and exit code 2, a full disk exit code 1.

    NoSuchPath is treated as a UserError.

    An import that fails because a library changed (`internals.py`) is treated as a UserError.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        try:
            return main(*args, **kwargs)
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
