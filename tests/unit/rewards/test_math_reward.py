r"""Handwritten answers against reward.function=math, compared with math-verify's own results.

Its own result is that of `parse` and `verify` on `\boxed{...}`, without time limits.  Where the two
differ, the difference is ours and intended; a new release with other results is detected here.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from megatron_prepo.config import RewardConfig
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.boxed import last_boxed
from megatron_prepo.rewards.math import boxed_answer, tidy
from megatron_prepo.rewards.pool import Grader

YES, NO = True, False
AGREED = {
    "fractions and roots": [
        (r"1/2", r"\frac{1}{2}", YES),
        (r"\frac12", r"0.5", YES),
        (r"\frac{3}{7}", r"\dfrac{6}{14}", YES),
        (r"\frac34", r"3/4", YES),
        (r"-\frac{1}{2}", r"\frac{1}{-2}", YES),
        (r"1\frac{1}{2}", r"\frac{3}{2}", YES),
        (r"4\frac12", r"2", NO),
        (r"2\sqrt{2}", r"\sqrt{8}", YES),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt3}", YES),
        (r"11\sqrt2", r"11\sqrt{2}", YES),
        (r"\frac{1}{3}", r"0.3333", NO),
        (r"\frac{1}{3}", r"0.333333", YES),  # six decimals do, as everywhere in math-verify
        (r"\pi", r"3.14", NO),
    ],
    "numbers": [
        (r"204", r"204.0", YES),
        (r"073", r"73", YES),  # AIME
        (r"1,234", r"1234", YES),
        (r"1{,}234", r"1234", YES),
        (r"1,234,567", r"1234567", YES),
        (r"2^{10}", r"1024", YES),
        (r"\binom{5}{2}", r"10", YES),
        (r"10^{-9}", r"2\cdot10^{-9}", NO),
        (r"-5", r"5", NO),
        (r"5", r"five", NO),
        (r"5", r"15", NO),
        (r"5", r"5 or 6", NO),
        (r"5", r"5, 6", NO),
        (r"5", r"[4,6]", NO),
        (r"5", r"x \ge 5", NO),
        (r"3+4i", r"4i+3", YES),
        (r"3+4i", r"3-4i", NO),
        (r"1001_2", r"1001_{2}", YES),
        (r"1001_2", r"9", NO),
        (r"\infty", r"-\infty", NO),
    ],
    "units and per cent": [
        (r"5", r"5\text{ cm}", YES),
        (r"5\text{ cm}", r"5", YES),
        (r"12", r"12\text{ inches}^2", YES),
        (r"90", r"90^\circ", YES),
        (r"90", r"90\text{ degrees}", YES),
        (r"\$32,348", r"32348", YES),
        (r"1.5", r"\$1.50", YES),
        (r"5", r"6\text{ cm}", NO),
        (r"15\text{ minutes}", r"900\text{ seconds}", NO),
        (r"18", r"18 dollars", NO),  # a product of letters
        (r"100", r"1", NO),
    ],
    "intervals": [
        (r"[1,2)", r"\left[1, 2\right)", YES),
        (r"[1,2]", r"(1,2)", NO),
        (r"[1,2)", r"(1,2]", NO),
        (r"x \in [-2,7]", r"[-2,7]", YES),
        (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)", YES),
        (r"(-\infty,0)\cup(1,\infty)", r"(-\infty,0)\cup[1,\infty)", NO),
        (r"x\le 2", r"2 \ge x", YES),
        (r"x\le 2", r"(-\infty,2]", YES),
        (r"x<2", r"x\le 2", NO),
    ],
    "sets, tuples, several answers": [
        (r"\{1,2\}", r"\{2,1\}", YES),
        (r"1,2", r"2,1", YES),
        (r"1,2", r"1", NO),
        (r"1,2", r"1,2,3", NO),
        (r"2, \frac{5}{2}", r"2.5 \text{ and } 2", YES),  # OlympiadBench
        (r"2, \frac{5}{2}", r"x=2\text{ or }x=\frac{5}{2}", YES),
        (r"\pm 2", r"2,-2", YES),
        (r"\pm 2", r"2", NO),
        (r"(3, \frac{\pi}{2})", r"\left(3,\frac{\pi}{2}\right)", YES),
        (r"(1,2)", r"(2,1)", NO),
        (r"(1,2,3)", r"(3,2,1)", NO),
        (r"(1,2)", r"1,2", YES),  # without the brackets, but in order
        (r"(1,2)", r"2,1", NO),
        (r"(2,1),(3,4)", r"(3,4),(2,1)", YES),
        (r"(2,1),(3,4)", r"(1,2),(4,3)", NO),
        (r"x=1, y=2", r"y=2,x=1", YES),
        (r"x=1, y=2", r"y=1,x=2", NO),
    ],
    "matrices": [
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"\begin{bmatrix}1&2\\3&\frac{8}{2}\end{bmatrix}",
            YES,
        ),
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"\begin{pmatrix}1&3\\2&4\end{pmatrix}",
            NO,
        ),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", NO),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"(1,2)", NO),
    ],
    "expressions and equations": [
        (r"x^2+2x+1", r"(x+1)^2", YES),
        (r"x^2+2x+1", r"(x-1)^2", NO),
        (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}", YES),
        (r"\sin^2 x", r"1-\cos^2 x", YES),
        (r"p-q", r"q-p", NO),
        (r"2x", r"2y", NO),
        (r"y=2x+1", r"2x+1", YES),
        (r"y=2x+1", r"2x-y+1=0", YES),
        (r"y=2x+1", r"y=2x+2", NO),
        (r"2x+3y=6", r"4x+6y=12", YES),
        (r"5", r"x=5", YES),
        (r"5", r"2+3=5", YES),
        (r"5", r"x=6", NO),
    ],
    "words": [
        (r"\text{Monday}", r"Monday", YES),
        (r"\text{Monday}", r"\textbf{Monday}", YES),
        (r"\text{Monday}", r"\text{Tuesday}", NO),
        (r"\text{(C)}", r"C", YES),
        (r"\text{C}", r"\text{(C)}", YES),
        (r"C", r"D", NO),
        (r"\text{even}", r"even", YES),
        (r"\text{east}", r"seat", NO),
        (r"\text{ellipse}", r"\text{an ellipse}", NO),
    ],
}
OURS = [  # answer, given, ours; math-verify returns the opposite
    (r"(-\infty, 2]", r"x \le 2", YES),
    (r"(-2,3)", r"-2<x<3", YES),
    (r"1234", r"1\,234", YES),
    (r"12 345", r"12345", YES),
    (r"5", r"5.", YES),
    (r"12.5\%", r"12.5", YES),
    (r"12.5", r"12.5\%", YES),
    (r"\emptyset", r"\varnothing", YES),
    (r"1e3", r"1000", YES),  # to math-verify e is Euler's number
    (r"1.5", r"1 1/2", YES),
    ("18", "\uff11\uff18", YES),
    (r"2", r"2\text{ million}", NO),
    (r"5", r"5\text{ dozen}", NO),
]
LENIENT = [  # accepted by both, though a strict reader would not
    (r"(1,2)", r"\{1,2\}"),
    (r"0.001", r"0.0010004"),
    (r"a+b=3", r"3"),
    (r"1", r"1\%"),  # and 50 for 50 per cent, which is intended
    (r"no", r"on"),
]


def box(answer: str) -> str:
    return f"Therefore the answer is $\\boxed{{{answer}}}$."


def opinion_of_math_verify(answer: str, given: str) -> bool:
    pair = (parse(box(text), parsing_timeout=None) for text in (answer, given))
    return verify(*pair, timeout_seconds=None)


@pytest.mark.parametrize("kind", AGREED)
def test_forms_of_answers_on_which_we_agree_with_math_verify(kind):
    for answer, given_answer, right in AGREED[kind]:
        case = f"{given_answer} for {answer}"
        assert boxed_answer(box(given_answer), answer) == right, case
        assert opinion_of_math_verify(answer, given_answer) == right, case


def test_forms_of_answers_on_which_we_differ_from_math_verify():
    for answer, given_answer, right in OURS:
        case = f"{given_answer} for {answer}"
        assert boxed_answer(box(given_answer), answer) == right, case
        assert opinion_of_math_verify(answer, given_answer) != right, case


def test_per_cent_does_not_depend_on_which_antlr_there_is():
    """math-verify reads 50 as 50 per cent with ANTLR 4.13, but not with 4.9."""
    for answer, given_answer in [(r"50\%", "50"), ("50", r"50\%"), (r"50\%", r"50.0\%")]:
        assert boxed_answer(box(given_answer), answer) == 1.0, (answer, given_answer)


def test_what_passes_although_it_should_not_is_known():
    for answer, given_answer in LENIENT:
        assert boxed_answer(box(given_answer), answer) == 1.0, (answer, given_answer)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (r"\boxed{4} is wrong; it is \boxed{5}.", YES),
        (r"\boxed{5} or rather \boxed{4}.", NO),
        (r"\boxed{4} \boxed{5} \boxed{6} \boxed{7}", NO),
        (r"I put \boxed{5} into \boxed{}.", YES),
        (r"Put the answer in \boxed{}. It is 5.", NO),
        (r"Put the answer in \boxed{answer}. So: \boxed{5}", YES),
        (r"\boxed{5} and then \boxed{5", NO),
        (r"\boxed{{5}}", YES),
        (r"\boxed{\boxed{5}}", YES),
        (r"\boxed{x = \boxed{5}}", YES),
        (r"\fbox{5}", YES),
        (r"\boxed 5", YES),
        (r"$5$", NO),
        (r"#### 5", NO),
        (r"The final answer is 5.", NO),
        (r"boxed{5}", NO),
        (r"\boxed{ \text{ } }", NO),
        (r"", NO),
        ("\\boxed{\n5\n}", YES),
        (r"\boxed{$5$}", YES),
        (r"\boxed{5\}}", NO),
    ],
)
def test_only_the_last_box_counts(completion, right):
    assert boxed_answer(completion, "5") == right


def test_braces_inside_a_box_are_matched_and_escaped_ones_are_mathematics():
    assert last_boxed(r"\boxed{\frac{1}{\sqrt{2}}} }") == r"\frac{1}{\sqrt{2}}"
    assert last_boxed(r"\boxed{\left\{ x \right.} }") == r"\left\{ x \right."
    assert last_boxed(r"\boxed{\begin{matrix}1\\{2}\end{matrix}}") == (
        r"\begin{matrix}1\\{2}\end{matrix}"
    )


TEXT = st.text(st.sampled_from("\\{}()[]^_$%&.,;:=<>+-*/!|~ 0123456789abcxyz\n\0\ud800∞π"))
WORDS = (
    r"\boxed{ } \frac \sqrt \text{ \left( \right) ^ _ ! x , \cup = < 1 23 . \\ & "
    r"\begin{pmatrix} \end{pmatrix}"
)
PIECES = st.lists(st.sampled_from(WORDS.split())).map("".join)


@pytest.fixture(scope="module")
def grader():
    grader = Grader(RewardConfig(function="math", seconds=1.0, processes=1, max_failed=1.0))
    yield grader
    grader.close()


@settings(max_examples=100, deadline=None)
@given(st.one_of(TEXT, PIECES))
def test_an_answer_equals_itself_and_nothing_breaks_its_process(grader, answer):
    prompt = Prompt("a", "q", answer, (1, 2), (0, 2))
    (grade,) = grader.grade([Rollout(prompt, (3,), (-0.5,), box(answer), True, 0)])
    assert grade.outcome != "error", grade
    if grade.outcome == "ok" and last_boxed(box(answer)) == answer.strip() != "":
        assert grade.reward == float(bool(tidy(answer)))
