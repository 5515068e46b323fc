"""A grading process: `python -m megatron_prepo.rewards.worker`, started by `pool`.

It imports the function once and then grades in a forked child: without threads and with little more
than the function in memory, a replacement child starts almost instantly.  It reports the names of
the arguments that the function takes: `{"ready": [...]}`.  On the socket whose other end `pool`
holds, the child reads `{NAME: VALUE, ...}` and writes `{"reward": ..., "metrics": {...}}` or
`{"error": ...}`, one JSON text per line.  Memory is limited, and so is the CPU time per answer:
beyond it the kernel kills the child, whatever it is doing, and the parent writes
`{"timeout": true}`.  If a child ends in any other way, the parent exits as well, and `pool` starts
a new one.
"""

import json
import math
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError
from megatron_prepo.files import user_code
from megatron_prepo.rewards import ARGUMENTS, arguments, load

MAX_WORDS = 600
METRIC = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Name of a metric of a reward function."""
RESERVED = ("mean", "zero_variance_ratio", "failed_ratio", "overlong_penalty")
"""Names of the metrics `reward/NAME` that every run has."""
FULL = 3
"""Exit code of a child that used up half its memory."""


def main(descriptor: str, name: str, seconds: str, memory_mb: str) -> None:
    """Report that the function is loaded, or the error; then grade until the socket is closed."""
    # Slurm warns all processes of a step before its end; the trainer decides how to react
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    limit_memory(int(memory_mb) << 20)
    with socket.socket(fileno=int(descriptor)) as channel:
        try:
            function = load(name)
        except UserError as error:
            send(channel, {"error": " ".join(str(error).split())[:MAX_WORDS]})
            return
        except Exception as error:  # a missing package, or no memory
            send(channel, {"error": sentence(error)})
            return
        send(channel, {"ready": arguments(function)})
        status = FULL
        while status in (FULL, -signal.SIGPROF):
            if status == -signal.SIGPROF:
                send(channel, {"timeout": True})
            child = os.fork()
            if child == 0:
                described = partial(user_code.described, file=user_file(name))
                serve(channel, function, float(seconds), int(memory_mb) << 20, described)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


def limit_memory(num_bytes: int) -> None:
    """Limit this process's address space and the size of its files; disable core files."""
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def user_file(name: str) -> Path:
    """Return the file of the function, without its directory for one of ours."""
    return Path(name.rpartition(":")[0] or name)


def serve(
    channel: socket.socket,
    function: Callable[..., Any],
    seconds: float,
    memory: int,
    described: Callable[[BaseException], str] = str,
) -> None:
    """Grade until the socket is closed, or half the memory is in use.

    The child then exits, so that memory used by earlier answers does not fail later ones.
    `described` returns an error of the function with its place.
    """
    for line in channel.makefile("r", encoding="ascii"):
        given = json.loads(line)
        by_place = [given.pop(name) for name in ARGUMENTS if name in given]
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if "record" in given:
                given["record"] = json.loads(given["record"])
            reply = reply_of(function(*by_place, **given))
        except MemoryError as error:
            with suppress(MemoryError):  # there may be no memory left for a message
                print(described(error), file=sys.stderr)
            os._exit(1)
        except (Exception, SystemExit) as error:  # any error of a function is this answer's grade
            reply = {"error": described(error)[:MAX_WORDS]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(channel, reply)
        if address_space() > memory // 2:
            os._exit(FULL)


def reply_of(returned: Any) -> dict[str, Any]:
    """Return the reward and the metrics of what a function returned, a number or a dict.

    Raises an error for anything else, which is this answer's grade.

    >>> reply_of({"reward": 1, "steps": 3}), reply_of(0.5)
    ({'reward': 1.0, 'metrics': {'steps': 3.0}}, {'reward': 0.5})
    """
    if not isinstance(returned, dict):
        return {"reward": number(returned, "a reward")}
    if "reward" not in returned:
        raise TypeError(f"a dict needs the key `reward`; it has {list(returned)!r:.80}")
    metrics = {name: value for name, value in returned.items() if name != "reward"}
    return {
        "reward": number(returned["reward"], "a reward"),
        "metrics": {checked_name(name): metric(value, name) for name, value in metrics.items()},
    }


def number(value: Any, what: str) -> float:
    """Return a value as a number; TypeError for a text."""
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"{what} must be a number, not the text {value!r:.80}")
    return float(value)


def metric(value: Any, name: str) -> float:
    """Return a value of a dict as a finite number."""
    found = number(value, f"the metric {name}")
    if not math.isfinite(found):
        raise ValueError(f"the metric {name} is {found}, not a finite number")
    return found


def checked_name(name: object) -> str:
    """Return the name of a metric."""
    if not isinstance(name, str) or not METRIC.fullmatch(name) or name in RESERVED:
        raise ValueError(
            f"{name!r:.80} cannot name a metric: letters, digits, _ . and - only, "
            f"and not {', '.join(RESERVED)}"
        )
    return name


def address_space() -> int:
    """Return the bytes of address space in use."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def send(channel: socket.socket, reply: Mapping[str, Any]) -> None:
    """Send a reply as one line of ASCII, whatever characters it contains."""
    channel.sendall(json.dumps(reply).encode("ascii") + b"\n")


def sentence(error: Exception) -> str:
    """Return the exception's type and message, truncated to 300 characters."""
    return f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    main(*sys.argv[1:])
