"""Prompt perplexity under the current policy (arXiv 2511.00794, section 3.1).

P_i = exp(-(1/T) sum_t log pi(x_t | x_<t)), natural log, over the prompt's tokens that have a
predecessor, at temperature 1.  `selection.ppl_tokens=content` excludes the chat template from the
sum, but not from the context x_<t.
"""

import torch


def perplexity(logprobs_T: torch.Tensor, span: slice = slice(None)) -> torch.Tensor:
    """Return exp of the mean negative log-probability, a float64 scalar.

    A uniform model over V tokens has perplexity V; the smallest possible value is 1.
    """
    return torch.exp(-logprobs_T[span].double().mean())


def scored_span(num_tokens: int, content: tuple[int, int] | None = None) -> slice:
    """Return the range of a prompt's log-probabilities that are averaged.

    Entry 0 belongs to the second token.  `content`: the range of tokens to include, without the
    chat template; None includes all.

    >>> scored_span(5), scored_span(5, (2, 4))
    (slice(0, 4, None), slice(1, 3, None))
    """
    if content is None:
        return slice(0, num_tokens - 1)
    begin, end = content
    return slice(max(begin, 1) - 1, max(end, 2) - 1)
