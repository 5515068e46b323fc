"""Exceptions that the command line shows as a sentence, without a stack trace."""

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A wrong setting, file or model; the message names the culprit, its value and the remedy."""


class Stopped(RuntimeError):
    """The run has stopped between two steps and can go on; the message says why and from where."""

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def in_one_line(main: Callable[..., int]) -> Callable[..., int]:
    """A `main` whose UserError becomes a line of stderr and the exit code 2.

    So does an import of what a library no longer has (`internals.py`).
    """

    @functools.wraps(main)
    def said(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except ImportError as error:
            from megatron_prepo import internals

            if (changed := internals.explain(error)) is None:
                raise
            print(f"error: {changed}", file=sys.stderr)
            return 2

    return said
