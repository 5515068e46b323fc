"""Settings of earlier versions, and the settings that replace them.

One table serves everything that an earlier version saved or read: a user's file, the `config.yaml`
of a run or a dump, and the records of a comparison.  A setting that a later version added is not in
it: its default means the earlier behaviour, at most with other rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_prepo.config.schema import DataConfig
from megatron_prepo.errors import UserError

Settings = dict[str, Any]
"""Values by `section.name`."""


def _micro_batch_tokens(size: Any, others: Settings) -> Settings | None:
    """Return as many tokens as the sequences of a micro-batch had at most."""
    prompt = others.get("data.max_prompt_tokens", DataConfig.max_prompt_tokens)
    completion = others.get("rollout.max_new_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return {}  # missing or invalid, which is an error of its own
    return {"train.micro_batch_tokens": size * (prompt + completion)} if _is_count(size) else None


def _head_memory(tokens: Any, _: Settings) -> Settings | None:
    """Return the memory for the logits of these tokens, of a vocabulary of 152,064."""
    return {"loss.head_memory_mib": tokens * 900 / 1024} if _is_count(tokens) else None


def _truncated_importance(cap: Any, _: Settings) -> Settings | None:
    if cap is None:
        return {"loss.importance": "off"}
    if not isinstance(cap, int | float) or isinstance(cap, bool) or cap < 1:
        return None
    return {"loss.importance": "truncated", "loss.importance_high": float(cap)}


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


@dataclass(frozen=True)
class Former:
    """A setting of an earlier version."""

    now: tuple[str, ...]
    """Settings that replace it."""
    values: Callable[[Any, Settings], Settings | None]
    """Values of `now` from its value and all other settings; None if nothing means the same."""
    meaning: str
    """What it was and which values can be replaced, for the error message."""


FORMER = {
    "train.micro_batch_size": Former(
        ("train.micro_batch_tokens",),
        _micro_batch_tokens,
        "it was the number of sequences per micro-batch, 1 or more",
    ),
    "loss.chunk_tokens": Former(
        ("loss.head_memory_mib",),
        _head_memory,
        "it was the number of tokens whose logits exist at a time, 1 or more",
    ),
    "loss.importance_cap": Former(
        ("loss.importance", "loss.importance_high"),
        _truncated_importance,
        "it was the cap on a token's ratio of actor to engine probability, which must now be 1 or "
        "more so that it keeps tokens on which both agree",
    ),
}
"""Settings that no longer exist."""

MEMORY = ("train.micro_batch_tokens", "loss.head_memory_mib")
"""Limits on memory.  Results depend on them by rounding only, and their predecessors counted
sequences and tokens, so that a number of today equals none of then."""


def replaced(settings: Settings) -> Settings:
    """Return the settings with former ones replaced; a given setting of today takes precedence.

    Raises UserError for a former setting whose value has no equivalent.
    """
    found = sorted(FORMER.keys() & settings.keys())
    result = {name: value for name, value in settings.items() if name not in found}
    for name in found:
        former, value = FORMER[name], settings[name]
        values = former.values(value, settings)
        if values is None:
            raise UserError(
                f"setting {name}={value!r} of an earlier version has no equivalent: "
                f"{former.meaning}; set {' and '.join(former.now)} instead"
            )
        result = values | result
    return result
