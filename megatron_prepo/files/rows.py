"""Rows of prompt files: prompt, answer and id, under the names of the schema that a file has.

| rows of | prompt | answer |
|---|---|---|
| this project | `prompt` | `answer` |
| verl | `prompt` | `reward_model.ground_truth` |
| slime | `prompt` | `label` |

A prompt is a text or a list of messages, `{"role": ..., "content": ...}`, whose last one is the
user's.  Which field has the answers is decided by the first row of a file, unless a setting names
it; a row with the answers of two schemas is an error, except for a text prompt with an `answer`:
that is a row of this project, whose other fields are free.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_prepo.errors import UserError, one_line
from megatron_prepo.files import json_lines, tables

OWN = "answer"
ANSWERS = (OWN, "reward_model.ground_truth", "label")
"""Fields of the answer, one per schema; a dot leads to a field within a field."""
ROLES = ("system", "user", "assistant")
LOSS_MASK = "step_loss_mask"
"""Field of a message of slime, for supervised training on it; here no message is trained on."""
NOT_TEXT = ("images", "videos", "audios", "multimodal_inputs", "tools")
"""Fields of verl and slime that change the model's input beyond the messages."""
NOT_ALONE = ("need_tools_kwargs", "tools_kwargs", "interaction_kwargs")
"""Fields in `extra_info` of verl, for tools and partners that answer the model."""
ONE_ANSWER = (None, "single_turn_agent")
"""Values of verl's `agent_name` for which the model answers once."""
SUFFIXES = (".jsonl", *tables.SUFFIXES)
SPLIT = re.compile(r"(?<![a-z])(train|test|val|valid|validation|dev|eval)(?![a-z])")
CACHE = re.compile(r"cache-.*\.arrow")
"""Files in which `datasets` keeps results of `map` and `filter` next to the rows."""

Message = dict[str, str]


class Fields(NamedTuple):
    """Names of the fields of a row."""

    prompt: str = "prompt"
    answer: str | None = None
    """None: decided by the first row of each file."""


class Record(NamedTuple):
    """A row of a prompt file."""

    where: str
    """`FILE, line N`, or `FILE, row N` of a table."""
    id: str
    """By default the number of the line or row, after the file's name if there are several."""
    prompt: str
    """The user's text; of a list of messages, that of the last one."""
    answer: str
    """Empty if the row has none."""
    line: str
    """Its JSON text."""
    earlier: tuple[Message, ...] | None = None
    """The messages before the last one; None if the prompt is a text."""

    @property
    def num_characters(self) -> int:
        """Length of the text of all messages."""
        return len(self.prompt) + sum(len(turn["content"]) for turn in self.earlier or ())


def read_records(
    place: str | Path, *, needs_answer: bool = True, fields: Fields | None = None
) -> Iterator[Record]:
    """Yield the record of each row of the files at a place (`data_files`).

    `needs_answer`: whether a row must have an answer.  If not, one that is no text or number, such
    as a list, counts as absent: only a reward that takes the record sees it.  Raises UserError
    naming file, row and field.
    """
    prompt_field, given = fields or Fields()
    files, seen = data_files(place), dict[str, str]()
    for file, name in zip(files, _names(files), strict=True):
        of_file = given
        for number, where, row, line in numbered_rows(file):
            prompt, earlier = _prompt(row, prompt_field, where)
            if given is None:
                text = earlier is None
                of_file = _answer_field(row, of_file, where, text=text, needs_answer=needs_answer)
            assert of_file is not None
            if given or of_file != OWN or earlier is not None:
                _refuse_other_inputs(row, where)
            answer = _answer(row, of_file, where, needs_answer=needs_answer)
            prompt_id = str(number) if len(files) == 1 else f"{name}:{number}"
            if row.get("id") is not None:
                prompt_id = json_lines.answer_field(row, "id", where)
            if prompt_id in seen:
                raise UserError(
                    f"{where}: id {prompt_id!r} is also that of {seen[prompt_id]}; give each row "
                    "its own, or remove the field `id` from all rows"
                )
            seen[prompt_id] = where.removeprefix(f"{place}, ")
            yield Record(where, prompt_id, prompt, answer, line, earlier)


def data_files(place: str | Path) -> list[Path]:
    """Return the files at a place: a file, the data files of a folder, or those of a pattern.

    Hidden files of a folder, and caches of `datasets`, are skipped.  Raises UserError if no file
    is left, for files of several formats, and for a folder whose files are of several splits.
    """
    path = Path(place)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        found = [file for file in found if not file.name.startswith(".")]
    elif path.exists() or not glob.has_magic(str(place)):
        return [path]
    else:
        found = sorted(Path(file) for file in glob.glob(str(place)) if Path(file).is_file())
    found = [file for file in found if not CACHE.fullmatch(file.name)]
    if not found:
        raise UserError(f"{place} has no files that end with {', '.join(SUFFIXES)}")
    if path.is_dir():
        _refuse_several(place, found, "folders or splits", [_split(file) for file in found])
    formats = [file.suffix if file.suffix in tables.SUFFIXES else ".jsonl" for file in found]
    _refuse_several(place, found, "formats", formats)
    return found


def _split(file: Path) -> tuple[Path, str]:
    """Return the folder of a file, and the split that its name has; empty if it has none."""
    return file.parent, next(iter(SPLIT.findall(file.name.lower())), "")


def _refuse_several(
    place: str | Path, found: list[Path], what: str, kinds: Sequence[object]
) -> None:
    """Raise UserError unless all files that were found at a place are of one kind."""
    if len(set(kinds)) == 1:
        return
    root = place if os.path.isdir(place) else os.path.commonpath([file.parent for file in found])
    names = ", ".join(os.path.relpath(file, root) for file in found[:6])
    raise UserError(
        f"{place} has files of several {what} ({names}); name those to read, such as "
        f"{found[0]}, in which * stands for any text"
    )


def _names(files: Sequence[Path]) -> list[str]:
    """Return names of files that differ: with their folders only where those without do not."""
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        root = os.path.commonpath([file.parent for file in files])
        names = [os.path.relpath(file, root) for file in files]
    return names


def exists(place: str | Path) -> bool:
    """Return whether there is anything at a place that `data_files` reads."""
    return os.path.exists(place) or bool(glob.has_magic(str(place)) and glob.glob(str(place)))


def num_rows(place: str | Path) -> int:
    """Return the number of rows at a place, without reading them as prompts."""
    number = 0
    for file in data_files(place):
        if file.suffix in tables.SUFFIXES:
            number += sum(1 for _ in tables.rows(file))
            continue
        with file.open(errors="replace") as lines:
            number += sum(bool(line.strip()) for line in lines)
    return number


def numbered_rows(file: Path) -> Iterator[tuple[int, str, dict[str, Any], str]]:
    """Yield number, place for errors, fields and JSON text of each row."""
    if file.suffix not in tables.SUFFIXES:
        for number, line in json_lines.lines(file):
            where = f"{file}, line {number}"
            yield number, where, json_lines.parsed(line, where), line
    elif not file.is_file():
        raise UserError(f"no such file: {file}")
    else:
        for number, row, line in tables.rows(file):
            yield number, f"{file}, row {number}", row, line


def _prompt(row: dict[str, Any], field: str, where: str) -> tuple[str, tuple[Message, ...] | None]:
    """Return the user's text, and the messages before it; None if the prompt is a text."""
    row = _at_the_top(row, field)
    if field not in row:
        raise _missing(row, field, where, "data.prompt_field")
    if not isinstance(row[field], list):
        return json_lines.text_field(row, field, where), None
    turns = [_message(turn, f"{field}[{i}]", where) for i, turn in enumerate(row[field])]
    if not turns or turns[-1]["role"] != "user":
        last = f"ends with a message of role {turns[-1]['role']}" if turns else "has no messages"
        raise UserError(
            f"{where}: field `{field}` {last}, but the model answers a message of the user; "
            "correct or remove the row"
        )
    if late := [i for i, turn in enumerate(turns) if i and turn["role"] == "system"]:
        raise UserError(
            f"{where}: field `{field}[{late[0]}]` is a system message, which can only be the first"
        )
    return turns[-1]["content"], tuple(turns[:-1])


def _message(turn: object, field: str, where: str) -> Message:
    """Return role and content of a message, which may also have slime's LOSS_MASK."""
    if not isinstance(turn, dict):
        raise UserError(f'{where}: field `{field}` must be {{"role": ..., "content": ...}}')
    role, content = (f"{field}.{name}" for name in ("role", "content"))
    named = {f"{field}.{name}": value for name, value in turn.items() if value is not None}
    if named.get(role) not in ROLES:
        raise UserError(
            f"{where}: field `{role}`={one_line(named.get(role))[:40]} must be one of "
            f"{', '.join(ROLES)}; tools are not supported"
        )
    if other := sorted(named.keys() - {role, content, f"{field}.{LOSS_MASK}"}):
        raise UserError(
            f"{where}: field `{other[0]}` would not reach the model, which is given role and "
            "content only; remove it"
        )
    return {"role": named[role], "content": json_lines.text_field(named, content, where)}


def _answer_field(
    row: dict[str, Any], before: str | None, where: str, *, text: bool, needs_answer: bool
) -> str:
    """Return the field of the answers of a file, given one of its rows and that of the rows before.

    `text`: whether the row's prompt is a text.  Raises UserError for a row with two schemas, or
    with another one than the rows before.
    """
    own = text and (OWN in row or not needs_answer)  # as the versions before knew rows
    present = [name for name in ANSWERS if row.get(name.partition(".")[0]) is not None]
    found = [OWN] if own else present or [before or OWN]
    if len(found) == 1 and before in (None, found[0]):
        return found[0]
    fields = " and ".join(f"`{name}`" for name in dict.fromkeys([*filter(None, [before]), *found]))
    raise UserError(
        f"{where}: the file's answers are in the fields {fields}, of different schemas; set "
        "data.answer_field to the one that counts, or correct the row"
    )


def _answer(row: dict[str, Any], field: str, where: str, *, needs_answer: bool) -> str:
    row = _at_the_top(row, field)
    if not needs_answer and not json_lines.has_answer(row, field):
        return ""
    if field not in row:
        raise _missing(row, field, where, "data.answer_field")
    if isinstance(row[field], dict | list):
        kind = json_lines.kind(row[field])
        raise UserError(
            f"{where}: field `{field}` must be a text or a number, but is {kind}; write it as a "
            "text, or take `record` in place of `answer` in the reward, which then gets it as it is"
        )
    return json_lines.answer_field(row, field, where)


def _missing(row: dict[str, Any], field: str, where: str, setting: str) -> UserError:
    return UserError(
        f"{where}: field `{field}` is missing; the line has {json_lines.names(row)}; correct the "
        f"row, or set {setting} to the field that has it"
    )


def _at_the_top(row: dict[str, Any], field: str) -> dict[str, Any]:
    """Return the row with a field within a field under its name with dots, if it has it.

    >>> _at_the_top({"reward_model": {"ground_truth": "4"}}, "reward_model.ground_truth")
    {'reward_model': {'ground_truth': '4'}, 'reward_model.ground_truth': '4'}
    """
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            return row
        value = value[name]
    return {**row, field: value}


def _refuse_other_inputs(row: dict[str, Any], where: str) -> None:
    """Raise UserError if the row has images or tools, which the model would not be given."""
    given = {name: row.get(name) for name in NOT_TEXT}
    if isinstance(info := row.get("extra_info"), dict):
        given |= {f"extra_info.{name}": info.get(name) for name in NOT_ALONE}
    remedy = "remove the row, or the field if it does not matter"
    if found := [name for name, value in given.items() if _has_content(value)]:
        raise UserError(
            f"{where}: field `{found[0]}` would not reach the model, which is given the text of "
            f"the messages only; {remedy}"
        )
    if (agent := row.get("agent_name")) not in ONE_ANSWER:
        raise UserError(
            f"{where}: field `agent_name`={one_line(agent)[:40]} asks for tools or several turns, "
            f"but the model answers once; {remedy}"
        )


def _has_content(value: object) -> bool:
    """Return whether a value is more than the nulls of a table whose other rows have it."""
    if isinstance(value, dict):
        return any(map(_has_content, value.values()))
    return bool(value)
