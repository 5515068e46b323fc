r"""The final answer of a text by any of three conventions, or the text itself.

It is what the last `<answer>...</answer>` holds; without one, what the last `\boxed{...}` holds;
without one, what follows the last `Answer:`; else all of the text.
"""

import re

from megatron_prepo.rewards.boxed import last_boxed

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MARK = re.compile(r"answer:", re.IGNORECASE)
NUMBER = re.compile(r"(?:(?<!\w)-)?\d(?:[\d,]*\d)?(?:\.\d+)?")


def final_answer(text: str) -> str:
    r"""Return the final answer of a text, without space around it.

    >>> final_answer("a <answer> b c </answer>."), final_answer(r"so \boxed{7 apples}, Answer: 8")
    ('b c', '7 apples')
    >>> final_answer("My answer:\n1 2\n3 4\n"), final_answer(" b c ")
    ('1 2\n3 4', 'b c')
    """
    if tagged := TAGGED.findall(text):
        return str(tagged[-1]).strip()
    return last_boxed(text) or MARK.split(text)[-1].strip()


def last_number(text: str) -> str:
    """Return the last number in a text, or the text if it has none.

    >>> last_number("3 + 4 = 7, and 7-9 = -2."), last_number("7-9"), last_number("1,234.50 or so")
    ('-2', '9', '1,234.50')
    """
    numbers: list[str] = NUMBER.findall(text)
    return numbers[-1] if numbers else text


def is_number(text: str) -> bool:
    """Return whether a text is a number as `last_number` finds it."""
    return NUMBER.fullmatch(text) is not None
