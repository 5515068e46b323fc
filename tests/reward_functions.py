"""Reward functions for `FILE.py:FUNCTION`, as a user may write them, and as no one should."""

import os
import signal
import sys
import time

LEAK = []


def length(completion: str, answer: str) -> float:
    """Return a well-behaved reward."""
    return len(completion) / 10


def misbehave(completion: str, answer: str) -> float:
    """Do what the completion names; 1 if that leaves the process alive."""
    match completion.split():
        case ["raise"]:
            raise RuntimeError("no \ud800 such \0 luck")
        case ["exit"]:
            sys.exit(0)
        case ["sleep"]:
            time.sleep(3600)
        case ["loop"]:
            while True:
                try:
                    10**100000 % 7
                except Exception:
                    continue
        case ["big-power"]:
            9 ** (9**9)  # one call into C, which no Python signal handler interrupts
        case ["memory"]:
            bytearray(4 << 30)
        case ["leak"]:
            LEAK.append(bytearray(300 << 20))
        case ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["stop"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        case ["print"]:
            print('{"reward": 0.5}' * 1000, file=sys.stderr)
            print('{"reward": 0.5}')
        case ["none"]:
            return None
        case ["not-a-number"]:
            return float("nan")
        case ["two"]:
            return 2.0
        case ["pid"]:
            return os.getpid() / 2**32
    return 1.0
