"""Prompts: read and validated once, then drawn in candidate batches, identical on every rank."""

import datetime
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_prepo import internals
from megatron_prepo.errors import UserError
from megatron_prepo.files.rows import Fields, Message, Record, read_records
from megatron_prepo.prompt_context import NONE, Context
from megatron_prepo.records import Prompt

MAX_CHARACTERS_A_TOKEN = 1000
"""Upper bound of any tokenizer's characters per token; longer prompts are rejected untokenized."""


def read_prompts(
    path: str | Path,
    tokenizer: Any,
    *,
    max_tokens: int,
    chat_template: bool = False,
    date: datetime.date | None = None,
    needs_answer: bool = True,
    context: Context = NONE,
    fields: Fields | None = None,
    dropped: list[str] | None = None,
) -> list[Prompt]:
    """Return the tokenized prompts of a file, or of several (`files/rows.py`).

    Each row is an object with a `prompt`, an answer that is a text or a finite number, and
    optionally an `id` (by default the line number); other fields are for a reward that takes the
    record.  `tokenizer` is one of `transformers`.  `date` is passed to its chat template as the
    current date; None: today.  `needs_answer`, `fields`: see `read_records`.  `context` stands
    before each prompt, and counts as a part of it.  Prompts of more than `max_tokens` tokens are
    skipped if there is a list `dropped`, which gets their ids.

    Raises `UserError` naming file and line for an invalid line, a missing or empty prompt or
    answer, a repeated id, and a prompt of more than `max_tokens` tokens without `dropped`.
    """
    prompts: list[Prompt] = []
    for record in read_records(path, needs_answer=needs_answer, fields=fields):
        if record.num_characters > MAX_CHARACTERS_A_TOKEN * max_tokens:
            _drop(record, f"{record.num_characters:,} characters", max_tokens, dropped)
            continue
        try:
            tokens, content = tokenize(
                record.prompt,
                tokenizer,
                chat_template=chat_template,
                date=date,
                context=context,
                earlier=record.earlier,
            )
        except UserError as error:
            if record.earlier is None:  # of the settings, not of the row
                raise
            raise UserError(f"{record.where}: {error}") from None
        except Exception as error:  # `tokenizers` raises this type for an unknown word
            raise UserError(f"{record.where}: the tokenizer rejects the prompt: {error}") from error
        if len(tokens) > max_tokens:
            _drop(record, f"{len(tokens)} tokens", max_tokens, dropped)
            continue
        if len(tokens) < 2:
            raise UserError(
                f"{record.where}: prompt {record.id!r} has {len(tokens)} token; perplexity needs "
                "at least one token with a predecessor"
            )
        prompts.append(
            Prompt(record.id, record.prompt, record.answer, tokens, content, record.line)
        )
    if not prompts:
        longer = f" of up to data.max_prompt_tokens={max_tokens} tokens" if dropped else ""
        raise UserError(f"{path} contains no prompts{longer}")
    return prompts


def _drop(record: Record, length: str, max_tokens: int, dropped: list[str] | None) -> None:
    """Add the id of a prompt that is too long to `dropped`; raise UserError without it."""
    if dropped is None:
        raise UserError(
            f"{record.where}: prompt {record.id[:80]!r} has {length}, more than "
            f"data.max_prompt_tokens={max_tokens} allows; shorten it, raise the limit, or drop "
            "such prompts by data.overlong_prompts=drop"
        )
    dropped.append(record.id)


def tokenize(
    text: str,
    tokenizer: Any,
    *,
    chat_template: bool,
    date: datetime.date | None = None,
    context: Context = NONE,
    earlier: Sequence[Message] | None = None,
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the token ids of a prompt, and the span of tokens that hold its text.

    With `chat_template` the text becomes a user turn followed by the generation prompt.  `earlier`:
    the messages before it, if the prompt is a list of messages; None if it is a text.
    """
    if chat_template:
        rendered, begin = _as_user_turn(text, tokenizer, date, context, earlier or ())
    elif earlier is not None:
        raise UserError(
            "the prompt is a list of messages, which only a chat template makes a text; set "
            "data.chat_template=true"
        )
    else:
        rendered = context.text + text
        begin = len(rendered) - len(text.lstrip())
    encoded = tokenizer(
        rendered, add_special_tokens=not chat_template, return_offsets_mapping=True, verbose=False
    )
    end = begin + len(text.strip())
    inside = [
        i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin and a < b
    ]
    tokens = tuple(encoded["input_ids"])
    return tokens, (inside[0], inside[-1] + 1) if begin >= 0 and inside else (0, len(tokens))


def _as_user_turn(
    text: str,
    tokenizer: Any,
    date: datetime.date | None,
    context: Context,
    earlier: Sequence[Message],
) -> tuple[str, int]:
    """Return the rendered chat and the offset of the text's first word; -1 if it was rewritten."""
    if not tokenizer.chat_template:
        raise UserError(
            "data.chat_template=true, but the tokenizer has no chat template; "
            "set data.chat_template=false"
        )

    def render(content: str) -> str:
        with _calendar(tokenizer, date):
            chat: str = tokenizer.apply_chat_template(
                context.turns(content, earlier),
                tokenize=False,
                add_generation_prompt=True,
                **context.arguments,
            )
        return chat

    # the template may contain the text's words, so a character that it lacks marks the position
    rendered, begin = render(text), render("\ufffc").find("\ufffc")
    # templates may shorten earlier answers of the model, such as by their reasoning
    given = [turn["content"].strip() for turn in earlier if turn["role"] != "assistant"]
    if ignored := [content for content in given if content not in rendered]:
        raise UserError(
            f"the tokenizer's chat template leaves out the message {ignored[0][:80]!r}; remove it, "
            "or put its text into the last one"
        )
    if begin >= 0 and rendered.startswith(text, begin):
        return rendered, begin + len(text) - len(text.lstrip())
    trimmed = begin >= 0 and rendered.startswith(text.strip(), begin)
    return rendered, begin if trimmed else -1


@contextmanager
def _calendar(tokenizer: Any, date: datetime.date | None) -> Iterator[None]:
    """Give chat templates this date as today's; None: today.

    `transformers` gives templates the date by its function `strftime_now`; from 5.23 on an argument
    of that name reaches a template as text.  Raises UserError if the function does not
    return the date, as it may in a later version.
    """
    from transformers.utils import chat_template_utils

    if date is None:
        yield
        return
    year, month, day = date.year, date.month, date.day

    class Calendar(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Calendar":
            return cls(year, month, day, tzinfo=tz)

    actual = internals.replace(chat_template_utils, "datetime", Calendar)
    try:
        probe = "{{ strftime_now('%Y-%m-%d') }}"
        turns = [{"role": "user", "content": ""}]
        shown = tokenizer.apply_chat_template(turns, chat_template=probe, tokenize=False)
        if shown != date.isoformat():
            raise UserError(
                f"the installed transformers gives chat templates the date {shown} where "
                f"{date.isoformat()} is set, so a resumed run would have other prompts; install a "
                "version that setup.py allows, or set data.chat_template=false"
            )
        yield
    finally:
        internals.replace(chat_template_utils, "datetime", actual)


class CandidateBatches:
    """Endless candidate batches of P prompts with unique ids; a pure function of seed and position.

    `shuffled`: each epoch is a new permutation; prompts that do not fill the last batch are skipped
    in that epoch.  `file`: the prompts as they are in the file, the first again after the last.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        num_candidates: int,
        seed: int,
        order: Literal["shuffled", "file"] = "shuffled",
    ) -> None:
        if len(prompts) < num_candidates:
            raise UserError(
                f"selection.num_candidates={num_candidates} is more than the {len(prompts)} "
                "prompts of data.train"
            )
        self.prompts, self.num_candidates = prompts, num_candidates
        self.seed, self.order = seed, order
        self.position = 0
        """Number of batches drawn so far."""

    def next(self) -> list[Prompt]:
        """Return the next P candidate prompts."""
        indices = self._of_file() if self.order == "file" else self._of_epoch()
        self.position += 1
        return [self.prompts[i] for i in indices]

    def _of_file(self) -> list[int]:
        first = self.position * self.num_candidates
        return [i % len(self.prompts) for i in range(first, first + self.num_candidates)]

    def _of_epoch(self) -> list[int]:
        batches_an_epoch = len(self.prompts) // self.num_candidates
        epoch, batch = divmod(self.position, batches_an_epoch)
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/candidates/{epoch}").shuffle(order)
        first = batch * self.num_candidates
        return order[first : first + self.num_candidates]

    def state_dict(self) -> dict[str, Any]:
        """Return the position, for a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved position."""
        self.position = state["position"]
