"""Reward functions by name, and GSM8K's `####` convention."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prepo.errors import UserError
from megatron_prepo.rewards import FUNCTIONS, check_file, check_name, load
from megatron_prepo.rewards.final_number import final_number
from megatron_prepo.rewards.number import number

COMPARING = sorted(FUNCTIONS.keys() - {"reasoning_gym"})
"""Functions of the answer alone."""
FILE = Path(__file__).resolve().parents[2] / "reward_functions.py"


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
        ("#### 18.00", "18"),
        ("#### 18", "18.0"),
        ("#### 18.", "18"),
        ("#### $18", "18"),
        ("#### $18$", "18"),
        ("#### \\$1,250.50", "1250.5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### +18", "18"),
        ("#### \u221218", "-18"),
        ("#### \uff0d\uff11\uff18\uff0e\uff15", "-18.5"),
        ("#### 1e3", "1000"),
        ("#### 1.5E-3", "0.0015"),
        ("#### .5", "1/2"),
        ("#### 1 1/2", "1.5"),
        ("#### 3/6", "0.5"),
        ("#### 50%", "50"),
        ("#### 018", "18"),
        ("#### -0", "0"),
        ("#### 12345678901234567890123.0", "12345678901234567890123"),
        ("#### 0.30000000000000000001", "0.300000000000000000010"),
        ("#### Monday", "Mon day"),
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
        ("#### 5.01", "5"),
        ("#### 1,2", "12"),
        ("#### 1,5", "1.5"),
        ("#### 12,345,6", "123456"),
        ("#### 1 1/2", "11/2"),
        ("#### 50%", "0.5"),
        ("#### 5/0", "0"),
        ("#### 5\u00b2", "52"),
        ("#### 1_000", "1000"),
        ("#### 0x10", "16"),
        ("#### inf", "1e999"),
        ("#### 12345678901234567890123", "12345678901234567890124"),
        ("#### 0.30000000000000004", "0.3"),
        ("####", ","),
        ("#### 5 #### 5", "5"),
        ("#### 4 #### 5", "5"),
        ("### 5", "5"),
    ],
)
def test_anything_else_is_wrong(completion, answer):
    """Answers without a marker, with nothing or more after it, with another number, or with all
    answers in sequence."""
    assert final_number(completion, answer) == 0.0


def ways(value):
    """Return texts that write a number exactly: decimals with zeros, commas, signs, fractions."""
    sign, size = "-" if value < 0 else "", abs(value)
    texts = [f"{sign}{size.numerator}/{size.denominator}"]
    scaled = size * 10**6
    if scaled.denominator == 1:
        whole, rest = divmod(int(scaled), 10**6)
        texts += [f"{sign}{whole}.{rest:06}", f"{sign}{whole:,}.{rest:06}00", f"{sign}{scaled}e-6"]
        texts += [f"{sign}${whole}.{rest:06}", f" {sign}{whole}.{rest:06}\\%"]
        if rest == 0:
            texts += [f"{sign}{whole}", f"{sign}{whole:,}", f"{sign}0{whole}.", f"${sign}{whole}$"]
    texts += [text.replace("-", "\u2212") for text in texts]
    texts += ["".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in text) for text in texts]
    return texts


NUMBERS = st.integers(-(10**30), 10**30).map(Fraction) | st.builds(
    Fraction, st.integers(-(10**12), 10**12), st.sampled_from([1, 3, 7, 8, 10, 1000, 10**6])
)


@settings(max_examples=100, deadline=None)
@given(NUMBERS, NUMBERS, st.data())
def test_a_number_is_the_same_in_every_way_to_write_it(value, other, data):
    given_text, answer = (data.draw(st.sampled_from(ways(value))) for _ in range(2))
    assert number(given_text) == value
    assert final_number(f"#### {given_text}", answer) == 1.0
    wrong = data.draw(st.sampled_from(ways(other)))
    assert final_number(f"#### {wrong}", answer) == float(other == value)


@settings(max_examples=300, deadline=None)
@given(st.text("0123456789.,/eE+-$%\\ \u2212\uff15\u0663x", max_size=12))
def test_what_python_reads_as_a_number_is_that_number(text):
    """All other texts that are accepted use signs that Python does not know."""
    found = number(text)
    try:
        theirs = Fraction(text)
    except (ValueError, ZeroDivisionError):
        assert found is None or re.search(r"[$%,\u2212\uff15 ]|\.$|\.[/eE]|[+-] ", text), text
    else:
        assert found == theirs or found is None


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize(
    ("given_text", "answer"),
    [
        ("18.00", "18"),
        ("$18", "18"),
        ("+18", "18"),
        ("\u221218", "-18"),
        ("\uff11\uff18", "18"),
        ("1,234", "1234"),
        ("1,234.50", "1234.5"),
        ("1e3", "1000"),
        ("1/2", "0.5"),
        ("1 1/2", "1.5"),
        ("50\\%", "50"),
        ("12345678901234567890123.0", "12345678901234567890123"),
    ],
)
def test_every_function_compares_numbers_as_numbers(name, given_text, answer):
    form = {"final_number": "#### {}", "math": "\\boxed{{{}}}"}[name]
    for one, other in ((given_text, answer), (answer, given_text)):
        assert load(name)(form.format(one), other) == 1.0
        assert load(name)(form.format(one), other + "1") == 0.0


@pytest.mark.parametrize("name", COMPARING)
def test_functions_are_found_by_name_and_tell_right_from_wrong(name):
    right = {"final_number": "#### 5", "math": "\\boxed{5}"}[name]
    assert load(name)(right, "5") == 1.0 and load(name)("5", "5") == 0.0


def test_a_function_of_ones_own_is_found_by_its_file():
    assert load(f"{FILE}:length")("four", "") == 0.4


@pytest.mark.parametrize("name", ["maths", "file.py", "file:f", "file.py:f()", ":math", ""])
def test_another_name_is_refused(name):
    with pytest.raises(
        UserError, match="is neither one of final_number, math, reasoning_gym nor of"
    ):
        check_name(name)


def test_a_file_that_is_not_there_is_refused():
    check_file("math"), check_file(f"{FILE}:length")
    with pytest.raises(UserError, match=r"no such file: absent\.py"):
        check_file("absent.py:f")


@pytest.mark.parametrize(
    "parameters", ["answer, completion", "ground_truth, solution_str", "a, output"]
)
def test_arguments_the_other_way_round_are_refused(tmp_path, parameters):
    """Arguments are positional: each completion would be looked for in its answer."""
    file = tmp_path / "mine.py"
    file.write_text(f"def grade({parameters}):\n    return 0.0\n")
    with pytest.raises(UserError, match="has its parameters in the opposite order"):
        load(f"{file}:grade")
    file.write_text("def grade(solution_str, ground_truth):\n    return 1.0\n")
    assert load(f"{file}:grade")("a", "b") == 1.0
