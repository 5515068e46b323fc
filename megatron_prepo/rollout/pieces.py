"""Completions as pieces of text, one per token, so that a reader needs no tokenizer."""

from collections.abc import Sequence

from megatron_prepo.rollout.engine import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes an incomplete character to."""
MAX_BYTES = 4
"""Bytes, and therefore tokens, of a character in UTF-8."""


def pieces(tokenizer: Tokenizer, completions: Sequence[Sequence[int]]) -> list[list[str]]:
    """Return the text of each token of each completion, special tokens included.

    Joined, the pieces of a completion are its decoded text.  A character that several tokens make
    up is the piece of the last of them; those of the tokens before it are empty.
    """
    distinct = {token for tokens in completions for token in tokens}
    alone = {token: _decode(tokenizer, [token]) for token in distinct}
    found = []
    for tokens in completions:
        separate = [alone[token] for token in tokens]
        # usually: tokens are independent unless they share a character, or begin a text
        joins = "".join(separate) == _decode(tokenizer, tokens)
        found.append(separate if joins else _pieces_in_context(tokenizer, tokens))
    return found


def _pieces_in_context(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """Return each token's addition to the text of the piece before it and itself."""
    found: list[str] = []
    before, read = 0, 0  # tokens[before:read] are the piece before
    for end in range(1, len(tokens) + 1):
        text = _decode(tokenizer, tokens[before:end])
        incomplete = text.endswith(UNKNOWN) and end - read < MAX_BYTES and end < len(tokens)
        if incomplete:
            found.append("")
            continue
        found.append(text[len(_decode(tokenizer, tokens[before:read])) :])
        before, read = read, end
    return found


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=False)
