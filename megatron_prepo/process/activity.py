"""What a command is doing, shown while it lasts: none is silent for longer than SECONDS.

A thread watches the command's output.  When there is none, it shows what `doing` names and for how
long: on a terminal in a line that is replaced, elsewhere as a line at growing intervals.

    ... checking model and prompts, 4 s
"""

import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TextIO, cast

SECONDS = 1.5
"""Maximum time without output, for the first lines of an activity."""
GROWTH = 0.1
"""Ratio of the interval between two lines in a log to the time that the activity has lasted."""
FILE_SECONDS = 10.0
"""Minimum interval between two lines in a file."""
QUIET = "MEGATRON_PREPO_QUIET"
"""Environment variable: if set and not empty, nothing is shown, as where a caller reads stderr."""
CLEAR = "\r\x1b[K"
"""Moves a terminal's cursor to the start of the line and clears it."""


class Bar(Protocol):
    """A progress bar on the terminal, which shows activities next to its name."""

    def show(self, inner: str) -> None:
        """Draw the bar again; `inner` names the activity that began after it, or is empty."""


@dataclass(eq=False)
class Entry:
    """An activity that has begun: its text, which may change, its start, and its bar, if any."""

    text: Callable[[], str]
    since: float
    bar: Bar | None = None


_entries: list[Entry] = []
"""The activities under way, the innermost last."""
_statuses: list["Status"] = []
"""The status of this process while it is shown."""


@contextmanager
def doing(text: str | Callable[[], str], bar: Bar | None = None) -> Iterator[None]:
    """Name what the block does; `bar`: a bar on the terminal that already shows `text`."""
    entry = begin(text, bar)
    try:
        yield
    finally:
        end(entry)


def begin(text: str | Callable[[], str], bar: Bar | None = None) -> Entry:
    """Begin an activity, which `end` ends; see `doing`."""
    entry = Entry((lambda: text) if isinstance(text, str) else text, time.monotonic(), bar)
    _entries.append(entry)
    return entry


def end(entry: Entry) -> None:
    """End an activity; a second call has no effect."""
    if entry in _entries:
        _entries.remove(entry)


@contextmanager
def shown(text: str) -> Iterator[None]:
    """Show the activities of the block, `text` where none is named.

    Not on ranks other than 0, in a command within another one, and with MEGATRON_PREPO_QUIET.
    """
    quiet = os.environ.get(QUIET) or os.environ.get("RANK", "0") != "0"
    if quiet or _statuses or sys.stderr is None:
        yield
        return
    status, before = Status(sys.stderr), (sys.stdout, sys.stderr)
    _statuses.append(status)
    sys.stdout, sys.stderr = (cast(TextIO, Watched(stream, status)) for stream in before)
    try:
        with doing(text), status.running():
            yield
    finally:
        sys.stdout, sys.stderr = before
        _statuses.remove(status)


@contextmanager
def handed_over() -> Iterator[None]:
    """Show nothing during the block, in which another process writes to the terminal."""
    for status in _statuses:
        status.wrote("\n")
        status.paused = True
    try:
        yield
    finally:
        for status in _statuses:
            status.paused, status.last = False, time.monotonic()


class Watched:
    """A text stream that reports to a status what is written to it."""

    def __init__(self, stream: TextIO, status: "Status") -> None:
        self.stream, self.status = stream, status

    def write(self, text: str) -> int:
        """Write the text, in place of the status line if one is shown."""
        self.status.wrote(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Status:
    """The line that shows the innermost activity, on the terminal or in a log."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.on_terminal = stream, stream.isatty()
        self.interval = FILE_SECONDS if _is_file(stream) else SECONDS
        self.last = time.monotonic()
        """The time of the last output."""
        if os.environ.get("RANK") and self.interval == SECONDS:
            self.last -= SECONDS  # the user has waited for its start
        self.at_line_start, self.drawn, self.paused = True, False, False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the activities in a thread until the end of the block."""
        ended = threading.Event()

        def watch() -> None:
            with suppress(OSError, ValueError):  # nobody reads any more, or the stream is closed
                while not ended.wait(SECONDS / 10):
                    self.look(time.monotonic())

        thread = threading.Thread(target=watch, name="activity", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.wrote("")

    def wrote(self, text: str) -> None:
        """Note output that is about to be written; clear the status line, or a bar's."""
        if self.at_line_start and (self.drawn or (text and _bar(_entries))):
            self.drawn = False
            self.stream.write(CLEAR)
        if text:
            self.last, self.at_line_start = time.monotonic(), text.endswith("\n")

    def look(self, now: float) -> None:
        """Show the innermost activity if nothing has been written for long enough."""
        entries = tuple(_entries)  # of this moment: the command's threads change them
        if self.paused or not self.at_line_start or not entries:
            return
        interval = self.interval
        if not self.on_terminal:
            interval = max(interval, GROWTH * (now - entries[-1].since))
        elif self.drawn or _bar(entries):
            interval = 1.0
        if now - self.last >= interval:
            self.last = now
            self._show(entries, now)

    def _show(self, entries: Sequence[Entry], now: float) -> None:
        if with_bar := _bar(entries):
            assert with_bar.bar is not None, "an entry with a bar"
            with_bar.bar.show(description(entries[entries.index(with_bar) + 1 :]))
            return
        line = f"... {description(entries[1:] or entries)}, {now - entries[-1].since:.0f} s"
        if self.on_terminal:
            self.drawn = True
            line = CLEAR + line[: max(20, shutil.get_terminal_size().columns - 1)]
        else:
            line += "\n"
        self.stream.write(line)
        self.stream.flush()


def description(entries: Sequence[Entry]) -> str:
    """Return activities in one line, the outermost first."""
    return ": ".join(entry.text() for entry in entries)


def terminal() -> TextIO:
    """Return the stream for bars, whose drawing does not count as output."""
    return _statuses[0].stream if _statuses else sys.stderr


def _is_file(stream: TextIO) -> bool:
    """Return whether a stream is a regular file; not one in memory, as in tests."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _bar(entries: Sequence[Entry]) -> Entry | None:
    """Return the innermost activity with a bar on the terminal."""
    return next((entry for entry in reversed(entries) if entry.bar is not None), None)
