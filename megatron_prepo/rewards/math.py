r"""Mathematics: the last `\boxed{...}` compared with the answer by math-verify (and latex2sympy2).

math-verify handles fractions, units, percentages, sets, intervals, tuples, matrices and equations.
`docs/evaluation.md` lists the differences and their reasons: only a box is an answer; a word such
as `million` is not a unit; an interval may be written as an inequality; a decimal percentage equals
its number; `1e3`, `1 1/2` and non-ASCII digits and signs are numbers; spaces between thousands, a
trailing full stop and alternative signs for the empty set are normalised.
"""

import logging
import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from megatron_prepo.rewards.boxed import last_boxed
from megatron_prepo.rewards.number import number

MAX_ANSWER_CHARS = 2000
"""Maximum characters of an answer; a longer one is wrong unless it is the same text."""
BOXED = [LatexExtractionConfig(boxed_match_priority=0)]
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;! ]|\{,\}|~| )\d{3})+(?![\d,])")
SIZE = re.compile(r"(?:hundred|thousand|million|billion|trillion|dozen)s?\b", re.IGNORECASE)
PER_CENT = re.compile(r"\s*\\?%$")

for _library in ("math_verify", "latex2sympy2_extended"):
    # silences warnings about answers that do not parse and about disabled time limits: the pool
    # enforces limits
    logging.getLogger(_library).setLevel(logging.CRITICAL)


def boxed_answer(completion: str, answer: str) -> float:
    r"""Return 1.0 if the content of the completion's last box equals the answer, else 0.0.

    >>> boxed_answer(r"so it is \boxed{\frac{1}{2}}", "0.5"), boxed_answer("it is 0.5", "0.5")
    (1.0, 0.0)
    """
    given = last_boxed(completion)
    return float(bool(given) and same(given, answer))


def same(given: str, answer: str) -> bool:
    """Return whether two answers, in LaTeX without delimiters, are equal."""
    given, answer = tidy(given), tidy(answer)
    if given == answer:
        return bool(given)
    written = number(given)
    if written is not None and written == number(answer):
        return True
    if len(given) > MAX_ANSWER_CHARS or SIZE.findall(given) != SIZE.findall(answer):
        return False
    if _equal(given, answer):
        return True
    plain = PER_CENT.sub("", given), PER_CENT.sub("", answer)
    return plain != (given, answer) and _equal(*plain)


def tidy(answer: str) -> str:
    r"""Remove notation that does not change the meaning of an answer.

    >>> tidy(r" $1\,234{,}567$. "), tidy("100, 200"), tidy(r"\varnothing")
    ('1234567', '100, 200', '\\emptyset')
    """
    answer = re.sub(r"^[\s$]+|(?<!\\)[\s$.]+$", "", answer)
    answer = THOUSANDS.sub(lambda number: re.sub(r"\D", "", number.group()), answer)
    return answer.replace("\\varnothing", "\\emptyset")


def _equal(given: str, answer: str) -> bool:
    equal: bool = verify(
        _parsed(answer), _parsed(given), allow_set_relation_comp=True, timeout_seconds=None
    )
    return equal


def _parsed(answer: str) -> list[Any]:
    expressions: list[Any] = parse(f"\\boxed{{{answer}}}", BOXED, parsing_timeout=None)
    return expressions


# the parser fills its tables at first use: done here once, not in every process forked from here
same(r"\frac{1}{2}", "0.5")
