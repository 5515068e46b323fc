"""Grading: GSM8K's `####` convention, and the bounds that a reward function promises."""

import math

import pytest

from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards import FUNCTIONS, grade
from megatron_prepo.rewards.final_number import final_number


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 + 3 = 5 #### 5", "5"),
        ("####5", "5"),
        ("#### 1 3", "13"),
        ("####\n\t-7  \n", "-7"),
        ("#### 1,234,567", "1234567"),
        ("#### 1234", "1,234"),
        ("it is 5. #### 0", "0"),
    ],
)
def test_the_answer_after_the_only_marker_is_correct(completion, answer):
    assert final_number(completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("", "5"),
        ("5", "5"),
        ("the answer is 5", "5"),
        ("5 ####", "5"),
        ("#### 5 apples", "5"),
        ("#### 15", "5"),
        ("#### 5", "15"),
        ("#### -5", "5"),
        ("#### 5.0", "5"),
        ("#### 5 #### 5", "5"),
        ("#### 4 #### 5", "5"),
        ("### 5", "5"),
    ],
)
def test_anything_else_is_wrong(completion, answer):
    """No marker, nothing or more behind it, another number, and all answers one after the other."""
    assert final_number(completion, answer) == 0.0


def rollouts(texts):
    prompt = Prompt("prompt-7", "2 + 3", "5", (1, 2), (0, 2))
    return [Rollout(prompt, (3,), (-0.5,), text, True, 0) for text in texts]


def test_rewards_come_in_the_order_of_the_rollouts():
    texts = ["#### 5", "#### 4", "", "#### 5"]
    assert grade(rollouts(texts), FUNCTIONS["final_number"]) == [1.0, 0.0, 0.0, 1.0]
    assert grade([], FUNCTIONS["final_number"]) == []


def test_a_completion_is_graded_against_the_answer_of_its_own_prompt():
    graded = []
    grade(rollouts(["a", "b"]), lambda text, answer: graded.append((text, answer)) or 0.0)
    assert graded == [("a", "5"), ("b", "5")]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -0.1, 1.1])
def test_a_reward_out_of_bounds_is_refused_by_name(reward):
    with pytest.raises(
        ValueError, match=r"prompt-7.*the text.*reward\.low=0\.0.*reward\.high=1\.0"
    ):
        grade(rollouts(["the text"]), lambda text, answer: reward)


def test_bounds_are_settings():
    assert grade(rollouts(["a"]), lambda text, answer: -1, low=-1, high=1) == [-1.0]
