"""The helper that other tests build on: answers in order, failures shown, no hangs."""

import os
import sys
import time

import pytest
from ranks import RankError, on_ranks


def answer(factor):
    return int(os.environ["RANK"]) * factor, os.environ["WORLD_SIZE"]


def fail_on_rank_one():
    if os.environ["RANK"] == "1":
        raise ValueError("the reason, in words")
    time.sleep(60)


def die():
    os._exit(3)


def hang():
    time.sleep(60)


def imported_late():
    loaded = set(sys.modules)
    import megatron_prepo.actor.actor
    import megatron_prepo.train  # noqa: F401

    return sorted(set(sys.modules) - loaded)


def test_ranks_have_imported_the_actor_and_megatron_when_they_start():
    """In each rank, these imports would take two seconds and more."""
    assert on_ranks(1, imported_late) == [[]]


def test_answers_come_in_the_order_of_ranks():
    assert on_ranks(3, answer, 10) == [(0, "3"), (10, "3"), (20, "3")]


def test_the_failing_ranks_traceback_is_shown_and_the_others_are_ended():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2 raised[\s\S]*the reason, in words"):
        on_ranks(2, fail_on_rank_one)
    assert time.monotonic() - started < 30


def test_a_rank_that_dies_without_a_word_is_a_failure():
    with pytest.raises(RankError, match="rank 0 of 1 ended with code 3"):
        on_ranks(1, die)


def test_a_rank_that_hangs_is_ended_at_the_deadline():
    started = time.monotonic()
    with pytest.raises(RankError, match="was not done after 1 s"):
        on_ranks(1, hang, deadline_s=1)
    assert time.monotonic() - started < 30
