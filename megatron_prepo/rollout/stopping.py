"""Where a completion ends: at a stop token, or with the token that completes a stop string.

Stop tokens are the model's own and those of `rollout.stop_tokens`; stop strings are those of
`rollout.stop`.  Both stay in the completion, with their log-probabilities: the policy chose them.
"""

import reprlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prepo.config import RolloutConfig
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_json
from megatron_prepo.rollout.engine import Tokenizer
from megatron_prepo.rollout.pieces import UNKNOWN

MOST_BYTES_A_CHARACTER = 4
"""Of UTF-8.  A tokenizer may cut characters anywhere."""


@dataclass(frozen=True)
class Stops:
    """What ends a completion."""

    tokens: frozenset[int]
    texts: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    """Needed for `texts`."""

    @classmethod
    def of(cls, settings: RolloutConfig, hf_directory: str | Path, tokenizer: Tokenizer) -> "Stops":
        """Return the configured stops, in addition to the model's own."""
        own = stop_tokens(hf_directory, tokenizer)
        named = named_tokens(settings.stop_tokens, tokenizer) if settings.stop_tokens else ()
        return cls(own.union(named), settings.stop, tokenizer)

    @property
    def window(self) -> int:
        """Number of last tokens that are enough to know whether a completion ends.

        A token has at least one byte, and up to three bytes after a stop string may belong to a
        character that is incomplete without the last token.
        """
        longest = max((len(text.encode()) for text in self.texts), default=0)
        return longest + 2 * MOST_BYTES_A_CHARACTER

    def end(self, tokens: Sequence[int]) -> bool:
        """Return whether a completion of which these are the (last) tokens ends here."""
        return tokens[-1] in self.tokens or (bool(self.texts) and self._end_in_text(tokens))

    def length(self, tokens: Sequence[int]) -> int | None:
        """Return the number of tokens up to the first at which a completion ends, or None."""
        ends = (n for n, token in enumerate(tokens, 1) if token in self.tokens)
        texts = (n for n in self._lengths_to_try(tokens) if self._end_in_text(tokens[:n]))
        return min((n for n in (next(ends, None), next(texts, None)) if n), default=None)

    def _lengths_to_try(self, tokens: Sequence[int]) -> range:
        """Return the numbers of tokens among which is the first that ends with a stop string.

        A search in all of a long completion would decode it as many times as it has tokens.
        """
        lengths, text = range(1, len(tokens) + 1), self._decode(tokens) if self.texts else ""
        if UNKNOWN in text:  # a broken character may hide the text before it
            return lengths
        if not self._in(text):
            return range(0)

        def soon(n: int) -> bool:
            # so does an incomplete character at the end, and one of four lengths has none
            return any(
                self._in(self._decode(tokens[:m])) for m in range(n, n + MOST_BYTES_A_CHARACTER)
            )

        first = bisect_left(lengths, True, key=soon)
        return lengths[first : first + MOST_BYTES_A_CHARACTER]

    def _end_in_text(self, tokens: Sequence[int]) -> bool:
        # a window that starts inside a character may decode to replacement characters only,
        # and one of four neighbours starts between two characters
        return any(
            self._in(self._decode(tokens[-(self.window - shorter) :]))
            for shorter in range(MOST_BYTES_A_CHARACTER)
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None, "stop strings need a tokenizer"
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def _in(self, text: str) -> bool:
        return any(stop in text for stop in self.texts)


def stop_tokens(hf_directory: str | Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a completion of the model, whatever the settings.

    They are read from generation_config.json, else config.json, else the tokenizer.  Raises
    UserError for a file that cannot be read or whose `eos_token_id` names no token.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(hf_directory) / name
        if not path.is_file():
            continue
        ids = read_json(path).get("eos_token_id")
        if ids is not None:
            listed = ids if isinstance(ids, list) else [ids]
            if not listed or any(type(t) is not int or not 0 <= t < 1 << 31 for t in listed):
                raise UserError(
                    f"{path}: eos_token_id={reprlib.repr(ids)} names no token, and completions "
                    "would never end; name one or several, or remove it for the tokenizer's"
                )
            return frozenset(listed)
    assert tokenizer.eos_token_id is not None, "preflight checks that there is a stop token"
    return frozenset([tokenizer.eos_token_id])


def named_tokens(names: Sequence[str], tokenizer: Any) -> frozenset[int]:
    """Return the ids of `rollout.stop_tokens`; UserError for one that the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    found = {name: int(name) if name.isdecimal() else vocabulary.get(name) for name in names}
    for name, token in found.items():
        if token not in known:
            raise UserError(
                f"rollout.stop_tokens: the tokenizer has no token {name!r}; give a token's text as "
                "the tokenizer's files have it, or its id, and any other text in rollout.stop"
            )
    return frozenset(found.values())


def unused_end_token(stops: frozenset[int], tokenizer: Any) -> tuple[str, str] | None:
    """Return a warning and a remedy if the tokenizer's end token ends no completion, else None."""
    token = tokenizer.eos_token_id
    if token is None or token in stops:
        return None
    text = tokenizer.convert_ids_to_tokens(token)
    return (
        f"the tokenizer's end token {text!r} ({token}) is none of the model's stop tokens "
        f"{sorted(stops)} (generation_config.json), so completions continue after it",
        f"if the model ends its answers with it, set rollout.stop_tokens=[{token}]",
    )
