r"""The final answer of a text by the convention of MATH: the last `\boxed{...}`."""

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*")
WORD = re.compile(r"[^\s$]+")


def last_boxed(text: str) -> str:
    r"""Return the content of the last non-empty `\boxed{...}` or `\fbox{...}`, with matched braces.

    The result is empty if there is no box, or if the last one is not closed: the answer is then
    incomplete.

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
        # \{ and \} are set braces, not grouping
        if text[i] in "{}" and (text[i - 1] != "\\" or text[i - 2] == "\\"):
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i]
    return None


def _word(text: str, box: re.Match[str]) -> str:
    word = WORD.match(text, box.end())
    return word.group().rstrip(".") if word else ""
