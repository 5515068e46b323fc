"""What grading processes print, in the file `reward.log` next to the logs of the ranks."""

import os
import sys
import threading
from pathlib import Path

OUTPUT = "reward.log"
MAX_BYTES = 16 << 20
"""Maximum size of the file; what is printed beyond it is dropped."""
TAIL_BYTES = 300


class OutputFile:
    """The file of all grading processes of a run; None as its path: output is dropped."""

    def __init__(self, path: Path | None) -> None:
        self._room, self._lock, self._file = MAX_BYTES, threading.Lock(), None
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - open as long as the run

    def write(self, words: bytes) -> None:
        """Append what one process printed, as long as there is room."""
        with self._lock:
            if self._file is None or self._room <= 0:
                return
            self._room -= len(words)
            end = b"" if self._room > 0 else b"\n[the limit of this file is reached]\n"
            try:
                self._file.write(words + end)
            except OSError as error:  # a full disk must not hold up the grading
                print(f"{self._file.name}: {error}: later output is dropped", file=sys.stderr)
                self._file.close()
                self._file = None

    def close(self) -> None:
        """Close the file; later output is dropped."""
        with self._lock:
            if self._file:
                self._file.close()
            self._file = None


DROPPED = OutputFile(None)


class Tap:
    """A pipe to which a process prints, read by a thread until all its writers have ended."""

    def __init__(self, output: OutputFile) -> None:
        self.output, self.tail = output, b""
        self._reader, self.writer = os.pipe()
        self._thread = threading.Thread(target=self._read, name="grading output", daemon=True)
        self._thread.start()

    def last_line(self) -> str:
        """Return the last line that was printed, once the process has ended; empty without one."""
        self._thread.join(timeout=1)  # a process that it left behind may hold the pipe
        lines = self.tail.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _read(self) -> None:
        while words := os.read(self._reader, 1 << 16):
            self.tail = (self.tail + words)[-TAIL_BYTES:]
            self.output.write(words)
        os.close(self._reader)
