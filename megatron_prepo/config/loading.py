"""A configuration from YAML files and ``key=value`` overrides, and back.

Files and overrides are YAML 1.2.  The type of a setting decides how an unquoted word is read: a
text setting keeps it (`off`, `010`), a numeric setting rejects it.
"""

import copy
import dataclasses
import difflib
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from megatron_prepo.config import former, yaml_text
from megatron_prepo.config.schema import PRESETS, Config, FilePath
from megatron_prepo.config.yaml_text import NULL, Plain
from megatron_prepo.errors import UserError, one_line

MAX_FILE_BYTES = 1 << 20
_TEXTS = {str, FilePath}
VARIABLE = re.compile(r"\$(\$|\w+|\{[^}]*\})", re.ASCII)

_SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a YAML file with overrides such as ``optimizer.lr=1e-6`` applied.

    Raises `UserError` that names every invalid setting, with the closest known name for an unknown
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
    nested = _nested(tree, str(path))
    given = _flat(nested).keys()
    for name in former.FORMER.keys() & given:
        if twice := sorted(given & set(former.FORMER[name].now)):
            raise UserError(f"{path}: {name} is now {twice[0]}, which is given too; remove {name}")
    return overridden(nested, overrides)


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Return a validated `Config` from nested dictionaries (not modified) and overrides."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        apply(tree, override)
    _replace_former(tree)
    _fill_preset(tree)
    return from_tree({name: _with_paths_expanded(name, value) for name, value in tree.items()})


def from_tree(tree: dict[str, Any]) -> Config:
    """Return a validated `Config` from nested dictionaries of values, without expanding paths."""
    tree = {name: _section(name, value) for name, value in tree.items()}
    if problems := list(_unfit(tree, "")):
        raise UserError("\n".join(problems))
    try:
        # JSON has the types of settings: pydantic's strict mode accepts a JSON list as a tuple, and
        # neither true nor "1" as 1
        return TypeAdapter(Config).validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise UserError("\n".join(_sentence(dict(e)) for e in error.errors())) from None


def to_tree(config: Config) -> dict[str, Any]:
    """Return the resolved configuration as nested dictionaries, as it is saved with the run."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as the text of a file that `load` reads."""
    tree = to_tree(config)
    for name, values in tree.items():
        for key, kind in _types(name).items():
            if FilePath in _parts(kind) and values[key] is not None:
                values[key] = with_paths(values[key], literal)
    return yaml_text.write(tree)


def literal(path: str | Path) -> str:
    """Return the text that a setting reads as this path, whatever characters it contains.

    >>> literal("runs/$5"), literal("~/mine")
    ('runs/$$5', './~/mine')
    """
    text = str(path)
    return ("./" + text if text.startswith("~") else text).replace("$", "$$")


def with_paths(value: Any, change: Callable[[str], Any]) -> Any:
    """Return the value of a setting that is a path, or several by name, with each one changed."""
    if isinstance(value, dict):
        return {name: change(path) for name, path in value.items()}
    return change(value)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `` (did you mean X?)`` with the closest known name, or an empty text if none is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def apply(tree: dict[str, Any], override: str) -> None:
    """Apply an override such as ``optimizer.lr=1e-6`` to nested dictionaries, in place."""
    key, equals, value = override.partition("=")
    *sections, name = key.split(".")
    if key in former.FORMER and isinstance(tree.get(sections[0]), dict):
        for now in former.FORMER[key].now:  # the override is what counts, not the file
            tree[sections[0]].pop(now.partition(".")[2], None)
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


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of nested dictionaries by `section.name`."""
    sections = {name: values for name, values in tree.items() if isinstance(values, dict)}
    return {f"{name}.{key}": v for name, values in sections.items() for key, v in values.items()}


def _replace_former(tree: dict[str, Any]) -> None:
    """Replace settings of earlier versions in nested dictionaries, in place."""
    if not former.FORMER.keys() & _flat(tree).keys():
        return
    before = _flat({name: _section(name, values) for name, values in tree.items()})
    now = former.replaced(before)
    for name in before.keys() ^ now.keys():
        section, _, key = name.partition(".")
        if name in now:
            tree[section][key] = now[name]
        else:
            del tree[section][key]


def _fill_preset(tree: dict[str, Any]) -> None:
    """Give the settings that `loss.preset` stands for their values, unless given, in place."""
    given = _flat(tree)
    preset = given.get("loss.preset")
    if not isinstance(preset, str):
        return
    for name, value in PRESETS.get(preset, {}).items():
        section, _, key = name.partition(".")
        if name not in given and isinstance(tree.setdefault(section, {}), dict):
            tree[section][key] = value


def value_for(text: str, kind: Any, what: str) -> Any:
    """Return a value typed in the shell as a field of this type; errors call it `what`."""
    return _typed(_from_shell(text, kind, what), kind)


def _from_shell(text: str, kind: Any, what: str) -> Any:
    """Parse text in quotes, brackets or braces as YAML; keep any other text, including a `#`."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    bracketed = text[:1] in ("[", "{") and not _parts(kind) <= {*_TEXTS, NoneType}
    return yaml_text.read(text, what) if quoted or bracketed else Plain(text)


def _empty_if_null(value: Any) -> Any:
    """Return an empty section in place of null (a section that holds comments only)."""
    return {} if isinstance(value, Plain) and value in NULL else value


def _nested(tree: dict[str, Any], what: str) -> dict[str, Any]:
    """Expand dotted keys such as `optimizer.lr: 1e-6` into sections."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        section, *inner = key.split(".")
        for name in reversed(inner):
            value = {name: value}
        _merge(result, {section: _empty_if_null(value)}, what, ())
    return result


def _merge(into: dict[str, Any], other: dict[str, Any], what: str, keys: tuple[str, ...]) -> None:
    """Merge one dictionary of settings into another; raise UserError for a setting in both."""
    for name, value in other.items():
        before, path = into.setdefault(name, value), (*keys, name)
        if before is value:
            continue
        if not isinstance(before, dict) or not isinstance(value, dict):
            raise UserError(
                f"{what}: {one_line('.'.join(path))} is given twice, in its section and as a "
                "dotted key; keep one of them"
            )
        _merge(before, value, what, path)


def _section(name: str, values: Any) -> Any:
    """Return a section with each value converted to its setting's type."""
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
    """Return a section as it was read, with `~` and `$NAME` in its paths expanded."""
    if not isinstance(values, dict):
        return values
    types, settings = _types(name), dict(values)
    for key, value in values.items():
        if not _is_path(value, types.get(key)):
            continue
        try:
            settings[key] = with_paths(value, _expanded)
        except UserError as error:
            raise UserError(f"setting {one_line(f'{name}.{key}')}: {error}") from None
    return settings


def _is_path(value: Any, kind: Any) -> bool:
    """Return whether a setting holds a path, or several by name."""
    if isinstance(value, dict):
        by_name = dict[str, FilePath] in _parts(kind)
        return by_name and all(isinstance(path, str) for path in value.values())
    empty = isinstance(value, Plain) and value in NULL
    return isinstance(value, str) and not empty and FilePath in _parts(kind)


def _types(section: str) -> dict[str, Any]:
    """Return the type of each setting of a section; empty for pass-through sections."""
    kind = _SECTIONS.get(section)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return {field.name: field.type for field in fields}


def _typed(value: Any, kind: Any) -> Any:
    """Convert a value to a setting's type: an unquoted word is text if the type allows text."""
    if isinstance(value, dict):
        inside = FilePath if dict[str, FilePath] in _parts(kind) else Any
        return {key: _typed(inner, inside) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [get_args(part)[0] for part in _parts(kind) if get_origin(part) in (tuple, list)]
        return [_typed(inner, items[0] if items else Any) for inner in value]
    if not isinstance(value, Plain):
        return value
    if value in NULL:
        return None
    return str(value) if _parts(kind) & _TEXTS else yaml_text.resolved(value)


def _parts(kind: Any) -> set[Any]:
    """Return the types in a union, or the one type; for a Literal, the types of its choices.

    >>> _parts(int | None) == {int, NoneType}, _parts(Literal["off", "on"])
    (True, {<class 'str'>})
    """
    if get_origin(kind) in (Union, UnionType):
        return set().union(*map(_parts, get_args(kind)))
    return set(map(type, get_args(kind))) if get_origin(kind) is Literal else {kind}


def _expanded(path: str) -> str:
    """Expand `~` and `$NAME` in a path; raise UserError for an unknown variable or user."""

    def variable_value(variable: re.Match[str]) -> str:
        known = variable[1].strip("{}")
        if known == "$":
            return "$"
        if not os.environ.get(known):
            raise UserError(
                f"{reprlib.repr(path)} uses the environment variable {one_line(known)}, which is "
                "not set or empty; set it, or write $$ for a literal $"
            )
        return os.environ[known]

    expanded = os.path.expanduser(VARIABLE.sub(variable_value, path))
    if expanded.startswith("~"):
        raise UserError(
            f"{reprlib.repr(path)} expands to {reprlib.repr(expanded)}, in which ~ names no known "
            "user; write the full path, or ./ before a literal ~"
        )
    return expanded


def _unfit(value: Any, key: str) -> Iterator[str]:
    """Yield an error message per value that no setting accepts: not valid in JSON, or too long."""
    what = f"setting {one_line(key)}" if key else "the configuration"
    match value:
        case dict():
            for name, inner in value.items():
                if isinstance(name, str) and _is_unicode(name):
                    yield from _unfit(inner, f"{key}.{name}" if key else name)
                else:
                    yield f"{what} has the key {reprlib.repr(name)}, which is not text"
        case list() | tuple():
            for inner in value:
                yield from _unfit(inner, key)
        case _:
            yield from _unfit_scalar(value, what)


def _unfit_scalar(value: Any, what: str) -> Iterator[str]:
    match value:
        case None | bool():
            pass
        case int():
            if abs(value) >= 1 << 63:
                yield f"{what} has an integer of more than 64 bits"
        case float():
            if not math.isfinite(value):
                yield f"{what}={value}: Input should be a finite number"
        case str():
            if not _is_unicode(value):
                yield f"{what}={reprlib.repr(value)} is not UTF-8 text"
        case _:
            yield f"{what}={reprlib.repr(value)}: a {type(value).__name__} is not a valid value"


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _sentence(error: dict[str, Any]) -> str:
    key = one_line(".".join(str(part) for part in error["loc"]))
    match error["type"]:
        case "unexpected_keyword_argument":
            return f"unknown setting {key}{nearest(key, _known_keys())}"
        case "missing":
            return "\n".join(f"setting {name} is required" for name in _required(key))
        case "value_error":
            return one_line(error["ctx"]["error"])
        case "list_type" | "tuple_type":
            example = _default(key) or [error["input"]]
            return (
                f"setting {key}={reprlib.repr(error['input'])} must be a list, such as "
                f"{key}={json.dumps(example, separators=(',', ':'))}"
            )
        case _:
            of_kind = ", true or false" if error["type"] == "bool_type" else ""
            return f"setting {key}={reprlib.repr(error['input'])}: {error['msg']}{of_kind}"


def _required(key: str) -> list[str]:
    """Return the required settings of a section; a key that is not a section is returned as is."""
    fields = dataclasses.fields(_SECTIONS[key]) if key in _SECTIONS else ()
    return [f"{key}.{field.name}" for field in fields if field.default is dataclasses.MISSING] or [
        key
    ]


def _default(key: str) -> Any:
    """Return a setting's default; None if it has none."""
    section, _, name = key.partition(".")
    fields = dataclasses.fields(_SECTIONS[section]) if section in _SECTIONS else ()
    return next(
        (f.default for f in fields if f.name == name and f.default is not dataclasses.MISSING), None
    )


def settings_like(option: str) -> list[str]:
    """Return the settings that someone may mean who types this option.

    >>> settings_like("--overwrite")
    ['run.overwrite']
    """
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    return [key for key in _known_keys() if name in (key, key.partition(".")[2])]


def _known_keys() -> list[str]:
    keys = []
    for section in dataclasses.fields(Config):
        keys.append(section.name)
        if dataclasses.is_dataclass(section.type):
            keys += [f"{section.name}.{field.name}" for field in dataclasses.fields(section.type)]
    return keys
