"""Exact parsing of numbers in the notations of models and data sets."""

import re
from decimal import Decimal
from fractions import Fraction

MAX_NUMBER_CHARS = 1000
"""Maximum characters of a number; a longer text is not one."""

# full-width signs and digits
ASCII: dict[int, int | str] = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
ASCII |= dict.fromkeys(map(ord, "\u2212\u2010\u2011\u2013\ufe63"), "-")  # minus and its look-alikes

WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
DECIMAL = rf"(?:{WHOLE}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?"
NUMBER = re.compile(
    rf"(?:\\?\$)*\s*(?P<sign>[-+]?)\s*(?:\\?\$)?"
    rf"(?:(?:(?P<mixed>\d+)[ ]+)?(?P<over>{WHOLE})/(?P<under>{WHOLE})|(?P<decimal>{DECIMAL}))"
    r"\s*(?:\\?%)?\s*(?:\\?\$)*"
)


def number(text: str) -> Fraction | None:
    r"""Return the number that a text denotes; None for any other text, a unit or a list.

    Currency ($) and percent signs are ignored, and so are commas between thousands; the minus may
    be a Unicode one, and digits may be of any script.

    >>> [str(number(text)) for text in ("$1,234.50", "\u221218", "1e3", "1 1/2", "50\\%", "18 kg")]
    ['2469/2', '-18', '1000', '3/2', '50', 'None']
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    written = NUMBER.fullmatch(text.strip().translate(ASCII))
    if not written:
        return None
    if written["decimal"]:
        value = Fraction(Decimal(written["decimal"].replace(",", "")))
    else:
        over, under = (int(written[part].replace(",", "")) for part in ("over", "under"))
        if under == 0:
            return None
        value = int(written["mixed"] or 0) + Fraction(over, under)
    return -value if written["sign"] == "-" else value
