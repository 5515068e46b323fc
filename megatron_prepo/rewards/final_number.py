"""GSM8K's convention: the answer follows ``####`` at the end of the completion."""

from fractions import Fraction

from megatron_prepo.rewards.number import number


def final_number(completion: str, answer: str) -> float:
    """Return 1.0 if the completion has exactly one ``####`` followed by the answer, else 0.0.

    Numbers are compared as numbers, exactly; anything else as text.  White space is ignored.

    >>> final_number("9 + 4 = 1 3 #### 1 3", "13"), final_number("#### 13 apples", "13")
    (1.0, 0.0)
    >>> final_number("#### $1,300.00", "1300"), final_number("#### 13.01", "13")
    (1.0, 0.0)
    """
    parts = completion.split("####")
    return float(len(parts) == 2 and _same(parts[1], answer))


def _same(given: str, answer: str) -> bool:
    numbers = _number(given), _number(answer)
    if None in numbers:
        return _bare(given) == _bare(answer)
    return numbers[0] == numbers[1]


def _number(text: str) -> Fraction | None:
    """Parse a number with spaces between its digits; in 1 1/2 the space is significant."""
    found = number(text)
    return number(_bare(text)) if found is None else found


def _bare(text: str) -> str:
    return "".join(text.split())
