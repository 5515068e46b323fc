"""Grading in separate processes, which hostile answers may crash; rank 0 grades for all ranks.

CPU time and memory are limited per answer.  An answer that exceeds a limit, or makes the function
raise, gets `reward.low` and a `Grade` that records the reason; a process that crashed is replaced.
Grading processes are started from scratch, not forked from a process with threads and a GPU, and
import `rewards` only.
"""

import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_prepo.config import RewardConfig
from megatron_prepo.errors import UserError
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards import FUNCTIONS, check_file
from megatron_prepo.rewards.output import DROPPED, OutputFile, Tap

START_SECONDS = 120.0
"""Timeout for a process to import its function."""
WALL_CLOCK_FACTOR = 10.0
"""Ratio of the wall-clock limit to the CPU time limit of an answer: a process may sleep, and a busy
machine must not turn a correct answer into a wrong one."""
MAX_STARTS = 3
"""Starts of a process that exits without an error message: someone else may have killed it."""
MAX_PROCESSES = 16
PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Grade:
    """A completion's reward and the outcome of grading it."""

    reward: float
    outcome: Literal["ok", "timeout", "error"] = "ok"
    """`timeout`: the time limit was exceeded; `error`: the function raised, or crashed its process.
    In both cases the reward is `reward.low`."""
    reason: str = ""
    """Exception that was raised, or exit status of the process."""
    seconds: float = 0.0
    """Wall-clock time spent on the answer by its process."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further numbers that the function returned, by name."""


def check(settings: RewardConfig) -> tuple[str, ...]:
    """Return the names of the arguments that the function takes.

    Raises UserError if it cannot be loaded or called in a grading process.
    """
    check_file(settings.function)
    worker = Worker(settings).when_ready()
    worker.end()
    return worker.takes


def result_here(future: Future[Any] | None) -> Any:
    """Return the result of a future; `share` of a job with one rank."""
    assert future is not None, "one rank is rank 0"
    return future.result()


class Grader:
    """Grades on rank 0; `share` broadcasts the result of rank 0's future (None on other ranks)."""

    def __init__(
        self,
        settings: RewardConfig,
        *,
        rank: int = 0,
        share: Callable[[Future[Any] | None], Any] = result_here,
        log: Callable[[str], None] = print,
        output: Path | None = None,
    ) -> None:
        """Start the processes; raises UserError on every rank if the function cannot be loaded.

        `output`: file for what a custom function prints, which rank 0 replaces.
        """
        self.settings, self.rank, self.share, self.log = settings, rank, share, log
        self.said_failure = False
        self.takes: tuple[str, ...]
        """Names of the arguments that the function takes."""
        if rank == 0:
            cores = len(os.sched_getaffinity(0))
            self.processes = settings.processes or min(cores, MAX_PROCESSES)
            self.threads = ThreadPoolExecutor(self.processes, "grading")
            self.output = OutputFile(None if settings.function in FUNCTIONS else output)
            self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.takes = self.share(self._on_rank_zero(self._start))

    def grade(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        """Return one grade per rollout; a rollout truncated at the length limit is graded as it is.

        Collective.  Raises UserError for a reward outside `reward.low` to `reward.high`, and if
        more than the share `reward.max_failed` of the answers failed.
        """
        grades: list[Grade] = self.share(self._on_rank_zero(self._grade_all, rollouts))
        for rollout, grade in zip(rollouts, grades, strict=True):
            self._check_range(rollout, grade.reward)
        self._check_failures(rollouts, grades)
        return grades

    def check_answers(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the function takes the answer and a prompt has none."""
        without = [prompt.id for prompt in prompts if not prompt.answer]
        if without and "answer" in self.takes:
            raise UserError(
                f"reward.function={self.settings.function} takes the answer, but {len(without)} of "
                f"{len(prompts)} prompts have none, such as {without[0]!r}; add the field `answer` "
                "to their lines, or let the function take (completion, *, record)"
            )

    def close(self) -> None:
        """Stop the processes."""
        if self.rank == 0:
            self.threads.shutdown(cancel_futures=True)
            while not self.idle.empty():
                worker = self.idle.get()
                if not worker.ended:
                    worker.end()
            self.output.close()

    def _on_rank_zero(
        self, function: Callable[..., object], *arguments: object
    ) -> Future[Any] | None:
        if self.rank != 0:
            return None
        future: Future[Any] = Future()
        threading.Thread(target=_run, args=(future, function, *arguments), daemon=True).start()
        return future

    def _start(self) -> tuple[str, ...]:
        takes: tuple[str, ...] = ()
        for worker in [Worker(self.settings, self.output) for _ in range(self.processes)]:
            ready = worker.when_ready()
            self.idle.put(ready)
            takes = ready.takes
        return takes

    def _grade_all(self, rollouts: Sequence[Rollout]) -> list[Grade]:
        return list(self.threads.map(self._grade_one, rollouts))

    def _grade_one(self, rollout: Rollout) -> Grade:
        worker = self.idle.get()
        try:
            # twice: an answer is blamed for the end of a process only if the process was a new one;
            # an older one may have been killed by someone else
            for _ in range(2):
                if worker.ended:
                    worker = Worker(self.settings, self.output).when_ready()
                start = time.monotonic()
                grade = worker.grade(rollout)
                if grade.outcome != "error" or not worker.ended:
                    break
            return replace(grade, seconds=time.monotonic() - start)
        finally:
            self.idle.put(worker)

    def _check_range(self, rollout: Rollout, reward: float) -> None:
        low, high = self.settings.low, self.settings.high
        if not (math.isfinite(reward) and low <= reward <= high):
            raise UserError(
                f"prompt {rollout.prompt.id!r}: reward {reward} of {rollout.text[:80]!r} is not "
                f"within reward.low={low} and reward.high={high}"
            )

    def _check_failures(self, rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> None:
        failed = [i for i, grade in enumerate(grades) if grade.outcome != "ok"]
        if not failed:
            return
        name, first = self.settings.function, grades[failed[0]]
        sentence = (
            f"reward.function={name} failed on {len(failed)} of {len(grades)} answers; the first, "
            f"to prompt {rollouts[failed[0]].prompt.id!r}: {first.outcome} {first.reason}".rstrip()
        )
        if len(failed) > self.settings.max_failed * len(grades):
            raise UserError(f"{sentence}; more than reward.max_failed={self.settings.max_failed}")
        if not self.said_failure:
            self.log(f"{sentence}; reward/failed_ratio counts further failures")
            self.said_failure = True


class Worker:
    """One grading process and the trainer's end of the socket to it."""

    def __init__(self, settings: RewardConfig, output: OutputFile = DROPPED) -> None:
        """Start the process; what it prints is appended to `output`."""
        self.settings, self.output = settings, output
        self.ended = False
        """Whether the process can no longer be used."""
        self.takes: tuple[str, ...] = ()
        """Names of the arguments that the function takes, once it is loaded."""
        self.printed = Tap(output)
        self.channel, theirs = socket.socketpair()
        self.replies = self.channel.makefile("r", encoding="ascii")
        path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        limits = (settings.seconds, settings.memory_mb)
        with theirs:
            arguments = map(str, (theirs.fileno(), absolute(settings.function), *limits))
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_prepo.rewards.worker", *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.printed.writer,
                stderr=self.printed.writer,
                # the order of sets, and with it sympy's work, must not differ between processes
                env=os.environ
                | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C goes to the trainer, whose exit ends the process
            )
        os.close(self.printed.writer)

    def when_ready(self, starts: int = MAX_STARTS) -> "Worker":
        """Wait for the process and return it, or a replacement if it exits first.

        Raises UserError if the function cannot be loaded.
        """
        reply, late = {}, False
        try:
            reply = self._receive(START_SECONDS)
        except TimeoutError:
            late = True
        except (OSError, ValueError):
            pass
        if "ready" in reply:
            self.takes = tuple(reply["ready"])
            return self
        status = self.end()
        if late:
            status = f"the file was not loaded after {START_SECONDS:g} s"
        elif starts > 1 and "error" not in reply:
            return Worker(self.settings, self.output).when_ready(starts - 1)
        raise UserError(
            f"reward.function={self.settings.function} does not load in a grading process with "
            f"reward.memory_mb={self.settings.memory_mb}: {reply.get('error', status)}; fix the "
            "file, or name another function (docs/evaluation.md)"
        )

    def grade(self, rollout: Rollout) -> Grade:
        """Return the grade of a completion; a process that does not reply has ended."""
        low, seconds = self.settings.low, self.settings.seconds * WALL_CLOCK_FACTOR
        given = {name: value for name, value in values(rollout).items() if name in self.takes}
        try:
            self.channel.settimeout(seconds)
            self.channel.sendall(json.dumps(given).encode("ascii") + b"\n")
            reply = self._receive(seconds)
        except TimeoutError:
            self.end()
            return Grade(low, "timeout")
        except (OSError, ValueError):
            return Grade(low, "error", self.end())
        match reply:
            case {"reward": reward}:
                return Grade(reward, metrics=reply.get("metrics", {}))
            case {"error": reason}:
                return Grade(low, "error", reason)
        assert reply == {"timeout": True}, f"unknown reply {reply}"
        return Grade(low, "timeout")

    def end(self) -> str:
        """Wait for the process to exit, or kill it and its child; returns its exit status."""
        self.ended = True
        self.replies.close()
        self.channel.close()
        try:
            status = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            status = self.process.wait()
        how = f"the grading process ended with status {status}"
        return ": ".join(filter(None, [how, self.printed.last_line()]))

    def _receive(self, seconds: float) -> dict[str, Any]:
        """Return the next reply; raises ValueError if there is none."""
        self.channel.settimeout(seconds)
        reply: dict[str, Any] = json.loads(self.replies.readline())
        return reply


def values(rollout: Rollout) -> dict[str, Any]:
    """Return the values of all arguments that a function may take; the record as JSON text."""
    return {
        "completion": rollout.text,
        "answer": rollout.prompt.answer,
        "record": rollout.prompt.record,
        "num_tokens": len(rollout.tokens),
        "finished": rollout.finished,
    }


def absolute(function: str) -> str:
    """Return `reward.function` with the absolute path of its file, if it has one."""
    file, _, name = function.rpartition(":")
    return f"{Path(file).resolve()}:{name}" if function not in FUNCTIONS else function


def _run(future: Future[Any], function: Callable[..., object], *arguments: object) -> None:
    try:
        future.set_result(function(*arguments))
    except BaseException as error:  # raised where the result is requested
        future.set_exception(error)
