"""What stands before the text of every prompt: a system message and worked examples."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prepo.config import DataConfig
from megatron_prepo.errors import UserError
from megatron_prepo.files import json_lines, rows
from megatron_prepo.files.rows import Message

Turns = list[Message]


@dataclass(frozen=True)
class Context:
    """What stands before the text of every prompt."""

    system: str | None = None
    """System message; needs a chat template."""
    shots: tuple[tuple[str, str], ...] = ()
    """Prompt and answer of each worked example."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""

    def turns(self, text: str, earlier: Sequence[Message] = ()) -> Turns:
        """Return the chat that ends with this text of the user.

        `earlier`: the messages before it in its row; the worked examples stand between a system
        message and the remaining ones.  Raises UserError for two system messages.
        """
        turns = [{"role": "system", "content": self.system}] if self.system else []
        first = [turn for turn in earlier if turn["role"] == "system"]
        if turns and first:
            raise UserError(
                f"the prompt has a system message, {first[0]['content'][:80]!r}, and data.system "
                "is set; remove one of the two"
            )
        turns += first
        for prompt, answer in self.shots:
            turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        rest = [turn for turn in earlier if turn["role"] != "system"]
        return [*turns, *rest, {"role": "user", "content": text}]

    @property
    def text(self) -> str:
        """The worked examples as plain text, where there is no chat template."""
        return "".join(f"{prompt}{answer}\n\n" for prompt, answer in self.shots)


NONE = Context()


def read_context(data: DataConfig, tokenizer: Any) -> Context:
    """Return the context that the settings describe.

    Raises UserError for a `data.few_shot` that is not a file of prompts and answers, and for a chat
    template that rejects or ignores a part of the context.
    """
    arguments = data.chat_template_arguments or {}
    context = Context(data.system, read_shots(data.few_shot), arguments)
    if data.chat_template and tokenizer.chat_template:
        _check_arguments(context.arguments, tokenizer)
        _check_turns("data.system", Context(data.system), context.arguments, tokenizer)
        _check_turns("data.few_shot", Context(None, context.shots), context.arguments, tokenizer)
    return context


def read_shots(path: str | None) -> tuple[tuple[str, str], ...]:
    """Return prompt and answer of each row of a file; empty without a file."""
    if path is None:
        return ()
    shots = []
    for _, where, record, _ in rows.numbered_rows(Path(path)):
        answer = json_lines.answer_field(record, "answer", where)
        shots.append((json_lines.text_field(record, "prompt", where), answer))
    if not shots:
        raise UserError(f"data.few_shot={path} contains no prompts; fill or remove it")
    return tuple(shots)


def _check_arguments(arguments: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise UserError for an argument that is the run's own, or that the template does not use."""
    own = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    template = tokenizer.get_chat_template()
    for name in arguments:
        if name in own:
            raise UserError(
                f"data.chat_template_arguments: {name} is set by the run itself; remove it"
            )
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(
                f"data.chat_template_arguments: the tokenizer's chat template does not use {name}, "
                "which would change nothing; correct its name, or remove it"
            )


def _check_turns(setting: str, part: Context, arguments: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise UserError unless the template accepts and shows all turns of a part of the context."""
    *turns, user = part.turns("?")
    if not turns:
        return
    remedy = f"remove {setting}, or put its text into the prompts"
    try:
        chat = tokenizer.apply_chat_template([*turns, user], tokenize=False, **arguments)
    except Exception as error:  # templates raise what they like, mostly jinja2's TemplateError
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{setting}: the tokenizer's chat template rejects it ({reason}); {remedy}"
        ) from error
    if ignored := [turn["content"] for turn in turns if turn["content"].strip() not in chat]:
        raise UserError(
            f"{setting}: the tokenizer's chat template leaves out {ignored[0][:80]!r}; {remedy}"
        )
