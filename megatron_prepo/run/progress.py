"""Progress for people: a bar on a terminal, and elsewhere, as in a cluster's log, a line a step.

train 12/80 [0:31<2:55, 2.6 s each] reward=0.52, entropy=0.31, rollouts=3072
"""

import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from tqdm import tqdm


def bar(*arguments: Any, **options: Any) -> "tqdm | Lines":
    """A tqdm bar if there is a terminal to draw it on; else `Lines`, which takes the same."""
    return (tqdm if sys.stderr.isatty() else Lines)(*arguments, **options)


class Lines:
    """What we use of tqdm, without drawing over what is written: `set_postfix` writes a line."""

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
        """`leave` is for bars: lines stay."""
        self.iterable, self.desc, self.disable = iterable, desc, disable
        self.total = len(iterable) if total is None else total
        self.n = self.initial = initial
        self._start = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable:
            self.n += 1  # the one that is under way, and done when its line is written
            yield item

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int) -> None:
        """So many more are done."""
        self.n += count

    def set_postfix(self, **values: object) -> None:
        """Write the line: how far, how long, how long yet, and the values."""
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
        """Nothing is left to be drawn."""


def clock(seconds: float) -> str:
    """As people read it.

    >>> clock(65.4), clock(3 * 3600 + 5)
    ('1:05', '3:00:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
