r"""What a text says its answer is, by the convention of MATH: the last `\boxed{...}`."""

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
WORD = re.compile(r"[^\s$]+")


def last_boxed(text: str) -> str:
    r"""What the last `\boxed{...}` or `\fbox{...}` that is not empty holds, braces inside matched.

    Nothing if there is none, or if the last one is not closed: then the answer is not finished.

    >>> last_boxed(r"so \boxed{1}, or \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> last_boxed(r"\boxed{7} goes into \boxed{}."), last_boxed(r"\boxed 7 is")
    ('7', '7')
    >>> last_boxed("no box"), last_boxed(r"\boxed{1}, no, \boxed{2")
    ('', '')
    """
    for box in reversed(list(BOX.finditer(text))):
        held = _braced(text, box.end()) if text.startswith("{", box.end()) else _word(text, box)
        if held is None:
            return ""
        if held.strip():
            return held.strip()
    return ""


def _braced(text: str, start: int) -> str | None:
    depth = 0
    for i in range(start, len(text)):
        # \{ and \} are braces of the mathematics
        if text[i] in "{}" and (text[i - 1] != "\\" or text[i - 2] == "\\"):
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i]
    return None


def _word(text: str, box: re.Match) -> str:
    word = WORD.match(text, box.end())
    return word.group().rstrip(".") if word else ""
