"""Reward functions by name, and GSM8K's `####` convention."""

from pathlib import Path

import pytest

from megatron_prepo.errors import UserError
from megatron_prepo.rewards import FUNCTIONS, check_file, check_name, load
from megatron_prepo.rewards.final_number import final_number

FILE = Path(__file__).resolve().parents[1] / "reward_functions.py"


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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_found_by_name_and_tell_right_from_wrong(name):
    right = {"final_number": "#### 5", "math": "\\boxed{5}"}[name]
    assert load(name)(right, "5") == 1.0 and load(name)("5", "5") == 0.0


def test_a_function_of_ones_own_is_found_by_its_file():
    assert load(f"{FILE}:length")("four", "") == 0.4


@pytest.mark.parametrize("name", ["maths", "file.py", "file:f", "file.py:f()", ":math", ""])
def test_another_name_is_refused(name):
    with pytest.raises(UserError, match="is none of final_number, math, and not of the form"):
        check_name(name)


def test_a_file_that_is_not_there_is_refused():
    check_file("math"), check_file(f"{FILE}:length")
    with pytest.raises(UserError, match=r"no such file: absent\.py"):
        check_file("absent.py:f")
