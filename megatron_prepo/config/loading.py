"""A configuration from YAML files and ``key=value`` overrides, and back.

Files and overrides are YAML 1.2, and the type of a setting decides what a word without quotes is: a
setting that takes text keeps it (`off`, `010`), and one that takes a number refuses it.
"""

import copy
import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from megatron_prepo.config import yaml_text
from megatron_prepo.config.schema import Config, FilePath
from megatron_prepo.config.yaml_text import NULL, Plain
from megatron_prepo.errors import UserError, one_line

MAX_FILE_BYTES = 1 << 20
_TEXTS = {str, FilePath}
VARIABLE = re.compile(r"\$(\$|\w+|\{[^}]*\})", re.ASCII)

_SECTIONS = {section.name: section.type for section in dataclasses.fields(Config)}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The run's configuration from a YAML file, changed by overrides such as ``optimizer.lr=1e-6``.

    Raises `UserError` that names every wrong setting, with the nearest known name for an unknown
    one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such configuration file: {path}")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    tree = _empty_if_null(yaml_text.read(text, str(path)))
    if not isinstance(tree, dict):
        kind = "list" if isinstance(tree, list) else "text"
        raise UserError(f"{path} must hold sections such as `run:`, not a {kind}")
    return overridden(_nested(tree, str(path)), overrides)


def overridden(tree: dict, overrides: Sequence[str]) -> Config:
    """A checked `Config` from nested dictionaries, which stay as they are, and overrides."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        apply(tree, override)
    return from_tree({name: _with_paths_expanded(name, value) for name, value in tree.items()})


def from_tree(tree: dict) -> Config:
    """A checked `Config` from nested dictionaries of values, in which nothing is expanded."""
    tree = {name: _section(name, value) for name, value in tree.items()}
    if problems := list(_unfit(tree, "")):
        raise UserError("\n".join(problems))
    try:
        # JSON has the types of settings: to pydantic's strict mode a list in it is a tuple, and
        # neither true nor "1" is a 1
        return TypeAdapter(Config).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise UserError("\n".join(_sentence(e) for e in error.errors())) from None


def to_tree(config: Config) -> dict:
    """The resolved configuration as nested dictionaries, as it is saved with the run."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The resolved configuration as the text of a file that `load` reads."""
    tree = to_tree(config)
    for name, values in tree.items():
        for key, kind in _types(name).items():
            if FilePath in _parts(kind) and values[key] is not None:
                values[key] = literal(values[key])
    return yaml_text.write(tree)


def literal(path: str | Path) -> str:
    """Return the text that a setting reads as this path, whatever characters are in it.

    >>> literal("runs/$5"), literal("~/mine")
    ('runs/$$5', './~/mine')
    """
    text = str(path)
    return ("./" + text if text.startswith("~") else text).replace("$", "$$")


def nearest(name: str, known: Sequence[str]) -> str:
    """`` (did you mean X?)`` for the known name closest to a misspelt one, else nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def apply(tree: dict, override: str) -> None:
    """Change nested dictionaries by an override such as ``optimizer.lr=1e-6``, in place."""
    key, equals, value = override.partition("=")
    *sections, name = key.split(".")
    if not equals or not name or not all(sections):
        raise UserError(f"override {reprlib.repr(override)} must have the form section.key=value")
    if not sections and dataclasses.is_dataclass(_SECTIONS.get(name)):
        raise UserError(
            f"override {reprlib.repr(override)}: {name} is a section; set one of its settings, "
            f"such as {name}.{dataclasses.fields(_SECTIONS[name])[0].name}=..."
        )
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UserError(
                f"override {reprlib.repr(override)}: {section} is a value, not a section"
            )
    section, _, setting = key.partition(".")
    kind = _types(section).get(setting, Any)
    tree[name] = _from_shell(value, kind, f"override {one_line(key)}: the value")


def value_for(text: str, kind: Any, what: str) -> Any:
    """What a value typed in the shell is for a field of this type; `what` it is, for errors."""
    return _typed(_from_shell(text, kind, what), kind)


def _from_shell(text: str, kind: Any, what: str) -> Any:
    """In quotes, brackets or braces it is YAML; otherwise all of it counts, also a `#`."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    bracketed = text[:1] in ("[", "{") and not _parts(kind) <= {*_TEXTS, NoneType}
    return yaml_text.read(text, what) if quoted or bracketed else Plain(text)


def _empty_if_null(value: Any) -> Any:
    """A section without settings, of comments only, is empty."""
    return {} if isinstance(value, Plain) and value in NULL else value


def _nested(tree: dict, what: str) -> dict:
    """Sections of settings, where a file may also say `optimizer.lr: 1e-6` in one line."""
    result: dict = {}
    for key, value in tree.items():
        section, *inner = key.split(".")
        for name in reversed(inner):
            value = {name: value}
        _merge(result, {section: _empty_if_null(value)}, what, ())
    return result


def _merge(into: dict, other: dict, what: str, keys: tuple[str, ...]) -> None:
    """Put the settings of a dictionary into another; UserError for one that both have."""
    for name, value in other.items():
        before, path = into.setdefault(name, value), (*keys, name)
        if before is value:
            continue
        if not isinstance(before, dict) or not isinstance(value, dict):
            raise UserError(
                f"{what}: {one_line('.'.join(path))} is given twice, in its section and by a key "
                "with a dot; keep one of them"
            )
        _merge(before, value, what, path)


def _section(name: str, values: Any) -> Any:
    """A section with its values as their settings' types take them."""
    if not isinstance(values, dict):
        return _typed(values, Any)
    types, settings = _types(name), {}
    for key, value in values.items():
        try:
            settings[key] = _typed(value, types.get(key, Any))
        except UserError as error:
            raise UserError(f"setting {one_line(f'{name}.{key}')}: {error}") from None
    return settings


def _with_paths_expanded(name: str, values: Any) -> Any:
    """A section as it was read, with `~` and `$NAME` in its paths expanded."""
    if not isinstance(values, dict):
        return values
    types, settings = _types(name), dict(values)
    for key, value in values.items():
        empty = isinstance(value, Plain) and value in NULL
        if isinstance(value, str) and not empty and FilePath in _parts(types.get(key)):
            try:
                settings[key] = _expanded(value)
            except UserError as error:
                raise UserError(f"setting {one_line(f'{name}.{key}')}: {error}") from None
    return settings


def _types(section: str) -> dict[str, Any]:
    """The type of each setting of a section; none of those that pass through."""
    kind = _SECTIONS.get(section)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {field.name: field.type for field in fields}


def _typed(value: Any, kind: Any) -> Any:
    """A value that was read, for a setting of this type: a word is a text where it may be one."""
    if isinstance(value, dict):
        return {key: _typed(inner, Any) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [get_args(part)[0] for part in _parts(kind) if get_origin(part) in (tuple, list)]
        return [_typed(inner, items[0] if items else Any) for inner in value]
    if not isinstance(value, Plain):
        return value
    if value in NULL:
        return None
    return str(value) if _parts(kind) & _TEXTS else yaml_text.resolved(value)


def _parts(kind: Any) -> set:
    """The types that a union joins, or the one type; of a Literal, those of its choices.

    >>> _parts(int | None) == {int, NoneType}, _parts(Literal["off", "on"])
    (True, {<class 'str'>})
    """
    if get_origin(kind) in (Union, UnionType):
        return set().union(*map(_parts, get_args(kind)))
    return set(map(type, get_args(kind))) if get_origin(kind) is Literal else {kind}


def _expanded(path: str) -> str:
    """The path with `~` and `$NAME` expanded; UserError naming a variable or user that is not."""

    def value_of(variable: re.Match) -> str:
        known = variable[1].strip("{}")
        if known == "$":
            return "$"
        if not os.environ.get(known):
            raise UserError(
                f"{reprlib.repr(path)} names the environment variable {one_line(known)}, which is "
                "not set, or empty; set it, or write $$ for a $ of the name"
            )
        return os.environ[known]

    expanded = os.path.expanduser(VARIABLE.sub(value_of, path))
    if expanded.startswith("~"):
        raise UserError(
            f"{reprlib.repr(path)} is {reprlib.repr(expanded)}, in which ~ names no user; write "
            "the path itself, or ./ before a ~ of the name"
        )
    return expanded


def _unfit(value: Any, key: str) -> Iterator[str]:
    """A sentence for each value that no setting can have: what JSON cannot hold, long numbers."""
    what = f"setting {one_line(key)}" if key else "the configuration"
    match value:
        case dict():
            for name, inner in value.items():
                if isinstance(name, str) and _is_unicode(name):
                    yield from _unfit(inner, f"{key}.{name}" if key else name)
                else:
                    yield f"{what} has the key {reprlib.repr(name)}, which is no text"
        case list() | tuple():
            for inner in value:
                yield from _unfit(inner, key)
        case None | bool():
            pass
        case int():
            if abs(value) >= 1 << 63:
                yield f"{what} has a whole number of more than 64 bits"
        case float():
            if not math.isfinite(value):
                yield f"{what}={value}: Input should be a finite number"
        case str():
            if not _is_unicode(value):
                yield f"{what}={reprlib.repr(value)} is not UTF-8 text"
        case _:
            yield f"{what}={reprlib.repr(value)}: a {type(value).__name__} is no setting"


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _sentence(error: dict) -> str:
    key = one_line(".".join(str(part) for part in error["loc"]))
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"unknown setting {key}{nearest(key, _known_keys())}"
        case "missing":
            return "\n".join(f"setting {name} is required" for name in _required(key))
        case "value_error":
            return one_line(error["ctx"]["error"])
        case _:
            of_kind = ", true or false" if error["type"] == "bool_type" else ""
            return f"setting {key}={reprlib.repr(error['input'])}: {error['msg']}{of_kind}"


def _required(key: str) -> list[str]:
    """The settings without a default in a section; anything else is one itself."""
    fields = dataclasses.fields(_SECTIONS[key]) if key in _SECTIONS else ()
    return [f"{key}.{field.name}" for field in fields if field.default is dataclasses.MISSING] or [
        key
    ]


def _known_keys() -> list[str]:
    keys = []
    for section in dataclasses.fields(Config):
        keys.append(section.name)
        if dataclasses.is_dataclass(section.type):
            keys += [f"{section.name}.{field.name}" for field in dataclasses.fields(section.type)]
    return keys
