"""Progress display: a bar on a terminal, and one line per step elsewhere, as in a cluster's log.

train 12/80 [0:31<2:55, 2.6 s each] reward=0.52, entropy=0.31, rollouts=3072
"""

import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from tqdm import tqdm


def bar(*arguments: Any, **options: Any) -> "tqdm | Lines":
    """Return a tqdm bar if stderr is a terminal; else `Lines`, which takes the same arguments."""
    return (tqdm if sys.stderr.isatty() else Lines)(*arguments, **options)


class Lines:
    """The part of tqdm's interface that we use, by lines: `set_postfix` writes one."""

    def __init__(
        self,
        iterable: Collection[Any] = (),
        desc: str = "",
        *,
        total: int | None = None,
        initial: int = 0,
        disable: bool = False,
        leave: bool = True,
    ) -> None:
        """Ignore `leave`, an option of bars: lines stay."""
        self.iterable, self.desc, self.disable = iterable, desc, disable
        self.total = len(iterable) if total is None else total
        self.n = self.initial = initial
        self._start = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            self.n += 1  # counts the current item, which is done when its line is written
            yield item

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int) -> None:
        """Count `count` more items as done."""
        self.n += count

    def set_postfix(self, **values: object) -> None:
        """Write the line: items done, time elapsed, time remaining, and the values."""
        if self.disable:
            return
        seconds, done = time.monotonic() - self._start, max(1, self.n - self.initial)
        each = seconds / done
        words = ", ".join(f"{name}={value}" for name, value in values.items())
        print(
            f"{self.desc} {self.n}/{self.total} [{clock(seconds)}<"
            f"{clock(each * (self.total - self.n))}, {each:.2g} s each] {words}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Do nothing: every line is already written."""


def clock(seconds: float) -> str:
    """Format seconds as minutes or hours.

    >>> clock(65.4), clock(3 * 3600 + 5)
    ('1:05', '3:00:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
