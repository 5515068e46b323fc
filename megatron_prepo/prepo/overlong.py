"""Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13).

    R_length(y) = 0                                      for |y| <= L_max - L_cache
                  ((L_max - L_cache) - |y|) / L_cache    up to L_max

L_max is the limit of new tokens, at which a completion is cut off, so none is longer.
"""


def soft_penalty(length: int, *, max_tokens: int, buffer: int) -> float:
    """Return R_length of a completion of `length` tokens, from -1 to 0; `buffer` is L_cache.

    >>> [soft_penalty(length, max_tokens=10, buffer=4) for length in (1, 6, 7, 10)]
    [0.0, 0.0, -0.25, -1.0]
    """
    assert length <= max_tokens, f"{length} tokens are more than the limit of {max_tokens}"
    return min(0.0, (max_tokens - buffer - length) / buffer)
