"""Progress display: a bar on a terminal, and lines elsewhere, as in a cluster's log.

train 12/80 [0:31<2:55, 2.6 s each] reward=0.52, entropy=0.31, rollouts=3072
"""

import os
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from tqdm import tqdm

from megatron_prepo.process import activity


def bar(*arguments: Any, **options: Any) -> "Bar | Lines":
    """Return a `Bar` if stderr is a terminal; else `Lines`, which takes the same arguments."""
    return (Bar if sys.stderr.isatty() else Lines)(*arguments, **options)


def no_bars_in_logs() -> None:
    """Disable the bars of libraries, also in other processes, unless stderr is a terminal."""
    if not sys.stderr.isatty():
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


class Bar(tqdm):
    """A tqdm bar that shows the activity under way, and whose clock moves in long steps."""

    def __init__(
        self, iterable: Any = None, desc: str = "", *, disable: bool = False, **options: Any
    ) -> None:
        self.name, self.entry = desc, None if disable else activity.begin(desc, self)
        super().__init__(iterable, desc, disable=disable, file=activity.terminal(), **options)

    def show(self, inner: str) -> None:
        """Draw the bar again, with the activity that began after it."""
        self.set_description_str(f"{self.name}, {inner}" if inner else self.name)

    def close(self) -> None:
        """Draw the bar for the last time."""
        if self.entry is not None:
            activity.end(self.entry)
            self.entry = None
            self.set_description_str(self.name, refresh=False)
        super().close()


class Lines:
    """The part of tqdm's interface that we use, by lines: of `set_postfix`, and of the end."""

    def __init__(
        self,
        iterable: Collection[Any] = (),
        desc: str = "",
        *,
        total: int | None = None,
        initial: int = 0,
        disable: bool = False,
        leave: bool = True,
        unit: str = "",
        unit_scale: bool = False,
    ) -> None:
        """Ignore `leave`, an option of bars: lines stay."""
        self.iterable, self.desc, self.disable = iterable, desc, disable
        self.unit = unit if unit_scale else ""
        self.total = len(iterable) if total is None else total
        self.n = self.initial = initial
        self._start = time.monotonic()
        self._written: int | None = None
        """Items done when the last line was written."""
        self._entry = None if disable else activity.begin(self._count)

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.n += 1
        finally:  # also if the loop was left before its end
            self.close()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._entry:
            activity.end(self._entry)

    def update(self, count: int = 1) -> None:
        """Count `count` more items as done."""
        self.n += count

    def refresh(self) -> None:
        """Do nothing: a bar would be drawn again."""

    def set_postfix(self, **values: object) -> None:
        """Write the line: items done, time elapsed, time remaining, and the values."""
        self.set_postfix_str(", ".join(f"{name}={value}" for name, value in values.items()))

    def set_postfix_str(self, words: str) -> None:
        """Write the line with these words at its end."""
        if self.disable:
            return
        seconds, done = time.monotonic() - self._start, max(1, self.n - self.initial)
        self._written = self.n
        each = seconds / done
        rate = "" if self.unit else f", {each:.2g} s each"
        left = clock(each * (self.total - self.n))
        line = f"{self._count()} [{clock(seconds)}<{left}{rate}] {words}".rstrip()
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Write the last line, unless it has been written."""
        if self._entry:
            activity.end(self._entry)
        if self._written != self.n:
            self.set_postfix_str("")

    def _count(self) -> str:
        if not self.unit:
            return f"{self.desc} {self.n}/{self.total}"
        done, total = (tqdm.format_sizeof(number, self.unit) for number in (self.n, self.total))
        return f"{self.desc} {done}/{total}"


def clock(seconds: float) -> str:
    """Format seconds as minutes or hours.

    >>> clock(65.4), clock(3 * 3600 + 5)
    ('1:05', '3:00:05')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
