"""GSM8K's convention: the answer is what follows ``####`` at the end of the completion."""


def final_number(completion: str, answer: str) -> float:
    """1.0 if the completion has exactly one ``####`` and the answer behind it, else 0.0.

    White space and thousands separators do not count.

    >>> final_number("9 + 4 = 1 3 #### 1 3", "13"), final_number("#### 13 apples", "13")
    (1.0, 0.0)
    """
    parts = completion.split("####")
    return float(len(parts) == 2 and _bare(parts[1]) == _bare(answer))


def _bare(text: str) -> str:
    return "".join(text.split()).replace(",", "")
