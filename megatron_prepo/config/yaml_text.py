"""YAML 1.2 for settings: read with the text of each scalar, written for readers of any version.

An unquoted scalar is read as `Plain`, its text: a text setting keeps it, and for any other setting
`resolved` returns its value in YAML 1.2's core schema (section 10.3.2).  There `off` and `yes` are
texts, `010` is ten and `1e-5` a number; in YAML 1.1 they are false, true, eight and a text.

Rejected: duplicate keys, aliases (a few hundred bytes of them can expand to gigabytes, or to a list
that contains itself), tags, multiple documents, and nesting deeper than MAX_DEPTH.
"""

import re
import sys
from collections.abc import Iterator
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from megatron_prepo.errors import UserError, one_line

MAX_DEPTH = 20
MAX_DIGITS = 100
"""Maximum digits of an integer; a longer one is an error."""

NULL = ("", "~", "null", "Null", "NULL")
BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

UNQUOTED = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
"""Words that a reader of either version may not read as text."""


class Plain(str):
    """Text of an unquoted scalar."""


def read(text: str, what: str) -> Any:
    """Parse YAML into dictionaries, lists, texts and `Plain` scalars; errors call the text `what`.

    Raises `UserError` for anything invalid or unsupported, with its line.
    """
    if "\x85" in text:  # a line break in YAML 1.1 and for the parser, but not in YAML 1.2
        raise UserError(f'{what} has the character U+0085; write it as "\\x85", in quotes')
    try:
        events = YAML(typ="safe", pure=True).parse(text)
        next(events)
        document = next(events)
        if isinstance(document, StreamEndEvent):
            return Plain("")
        if document.version not in (None, (1, 2)):
            version = ".".join(map(str, document.version))
            raise UserError(f"{what} is marked %YAML {version}, but only YAML 1.2 is supported")
        value = _value(next(events), events, what, ())
        next(events)
        if not isinstance(next(events), StreamEndEvent):
            raise UserError(f"{what} contains multiple documents; it must be a single one")
    except UserError:
        raise
    except (YAMLError, ValueError, OverflowError) as error:  # last two: bad escapes and versions
        raise UserError(f"{what} is not valid YAML: {one_line(error)}") from error
    return value


def _value(event: Event, events: Iterator[Event], what: str, keys: tuple[str, ...]) -> Any:
    """Return the value that starts with an event; `keys` is the path to it."""
    line = event.start_mark.line + 1
    if isinstance(event, AliasEvent):
        raise UserError(f"{what}, line {line}: a YAML alias (*name) is not supported")
    if event.tag:
        raise UserError(f"{what}, line {line}: a YAML tag ({event.tag}) is not supported")
    if isinstance(event, ScalarEvent):
        return event.value if event.style else Plain(event.value)
    if len(keys) >= MAX_DEPTH:
        raise UserError(f"{what}, line {line}: nested more than {MAX_DEPTH} deep")
    if isinstance(event, SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(item := next(events), SequenceEndEvent):
            items.append(_value(item, events, what, (*keys, str(len(items)))))
        return items
    assert isinstance(event, MappingStartEvent), f"{event} does not start a value"
    found: dict[str, Any] = {}
    lines: dict[str, int] = {}
    while not isinstance(key := next(events), MappingEndEvent):
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarEvent | AliasEvent):
            raise UserError(f"{what}, line {line}: a key must be a text")
        name = str(_value(key, events, what, keys))
        path = (*keys, name)
        if name in found:
            raise UserError(
                f"{what}: {one_line('.'.join(path))} is given twice, in lines {lines[name]} and "
                f"{line}; keep one of them"
            )
        found[name], lines[name] = _value(next(events), events, what, path), line
    return found


def resolved(text: str) -> str | int | float | bool | None:
    """Return the value of a plain scalar in YAML 1.2's core schema.

    >>> [resolved(text) for text in ("010", "1e-5", "true", "off", "1:30", "~")]
    [10, 1e-05, True, 'off', '1:30', None]
    """
    if text in NULL:
        return None
    if text in BOOLEAN:
        return BOOLEAN[text]
    if INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise UserError(f"{text[:20]}...: an integer of {len(text):,} digits is too long")
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return str(text)


def write(tree: dict[str, Any]) -> str:
    """Format nested dictionaries as YAML that `read` and YAML 1.1 readers read identically.

    Texts are quoted unless every reader reads them as text.
    """
    yaml, text = YAML(typ="safe", pure=True), StringIO()
    yaml.Representer = _Representer
    yaml.default_flow_style, yaml.width = False, sys.maxsize
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(tree, text)
    return text.getvalue()


class _Representer(SafeRepresenter):
    """Texts and numbers in a form that both versions of YAML read identically."""

    def represent_text(self, text: str) -> ScalarNode:
        """Represent a text, in double quotes unless it is a plain word."""
        bare = UNQUOTED.fullmatch(text) and text.lower() not in WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if bare else '"')

    def represent_number(self, number: float) -> ScalarNode:
        """Represent a number with all digits and a point: YAML 1.1 reads 1e-05 as text."""
        text = repr(number)
        text = text if "." in text else text.replace("e", ".0e")
        return self.represent_scalar("tag:yaml.org,2002:float", text)


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(float, _Representer.represent_number)
