"""The launcher: all end well, or all end, and the error shown is that of the first to fail."""

import sys
import time

import pytest

from megatron_prepo.local_ranks import RanksFailed, start


def run(tmp_path, code: str, num_ranks: int = 3) -> None:
    preamble = (
        "import os, sys, time, signal\n"
        "from megatron_prepo.local_ranks import run_rank\n"
        "from megatron_prepo.errors import UserError\n"
        "rank = int(os.environ['RANK'])\n"
    )
    start([sys.executable, "-c", preamble + code], num_ranks, tmp_path / "logs")


def test_all_ranks_run(tmp_path):
    run(tmp_path, f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write('here')")
    assert sorted(p.name for p in tmp_path.glob("[0-9]")) == ["0", "1", "2"]


def test_the_first_error_is_shown_and_the_others_are_ended(tmp_path):
    code = """
def main():
    if rank == 1:
        raise ValueError("the culprit")
    time.sleep(60)
sys.exit(run_rank(main))
"""
    begin = time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        run(tmp_path, code)
    assert time.monotonic() - begin < 30
    message = str(failure.value)
    assert message.startswith("rank 1 failed") and message.endswith("ValueError: the culprit\n")
    assert message.count("Traceback") == 1


def test_an_error_that_follows_from_another_is_not_shown(tmp_path):
    code = """
def main():
    time.sleep(0.0 if rank == 2 else 0.3)
    raise ValueError("cause" if rank == 2 else "connection reset by peer")
sys.exit(run_rank(main))
"""
    with pytest.raises(RanksFailed, match="rank 2 failed") as failure:
        run(tmp_path, code)
    assert "reset by peer" not in str(failure.value)


def test_a_users_error_has_no_stack_trace(tmp_path):
    code = "sys.exit(run_rank(lambda: (_ for _ in ()).throw(UserError('set x=1'))))"
    with pytest.raises(RanksFailed) as failure:
        run(tmp_path, code)
    assert str(failure.value) == "error: set x=1"


def test_a_killed_rank_is_named(tmp_path):
    code = "print('last words', flush=True)\nif rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)"
    with pytest.raises(RanksFailed, match="rank 1 died with SIGKILL") as failure:
        run(tmp_path, code)
    assert "out of memory" in str(failure.value) and "last words" in str(failure.value)
