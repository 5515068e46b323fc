"""The configuration reference in Markdown, printed from the docstrings of the settings."""

import dataclasses
from typing import Any, Literal, get_args, get_origin

from megatron_prepo.config.schema import Config, FilePath

HOW_VALUES_ARE_READ = """\
Files and `key=value` overrides are YAML 1.2. The type of a setting decides how an unquoted word is
read: a `str` or a choice keeps it (`off`, `010`, `1:30`); an `int`, `float` or `bool` accepts a
number (`010` is ten, `1e-5` a number), `true` or `false`, and rejects anything else. A missing
value, `null` and `~` mean empty. In a `path`, `~/` and `$NAME` are expanded; an unset variable is
an error, and `$$` stands for `$`. Everything after the `=` of an override is its value, including
a ` #`, unless the value is in quotes, brackets or braces. In a file, `optimizer.lr: 1e-6` is the
same as `lr: 1e-6` in the section `optimizer`; a setting that is given twice is an error."""


def markdown() -> str:
    """Return the configuration reference in Markdown."""
    lines = [HOW_VALUES_ARE_READ]
    for section in dataclasses.fields(Config):
        kind = section.type
        lines.append(f"\n## `{section.name}`\n")
        if not dataclasses.is_dataclass(kind):
            lines.append(_description(Config, section.name))
            continue
        lines += [str(kind.__doc__), "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            default = "(required)" if field.default is dataclasses.MISSING else _yaml(field.default)
            text = _description(kind, field.name)
            lines.append(
                f"| `{section.name}.{field.name}` | {_type_name(field.type)} | {default} | "
                f"{text.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(lines).strip() + "\n"


def _description(section: Any, setting: str) -> str:
    return " ".join(section.__pydantic_fields__[setting].description.split())


def _yaml(value: Any) -> str:
    if isinstance(value, tuple) and value:
        return f"[{', '.join(map(str, value))}]"
    words = {"None": "(empty)", "()": "(empty)", "True": "true", "False": "false"}
    return words.get(str(value), str(value))


def _type_name(kind: Any) -> str:
    if getattr(kind, "__origin__", None) is Literal:
        return " or ".join(f"`{choice}`" for choice in kind.__args__)
    if kind == FilePath:
        return "path"
    if get_origin(kind) is dict:
        of_values = get_args(kind)[1]
        return f"mapping of names to {'values' if of_values is Any else _type_name(of_values)}"
    if get_origin(kind) is tuple:
        return f"list of {_type_name(get_args(kind)[0])}"
    if isinstance(kind, type):
        return kind.__name__
    return " or ".join(
        "empty" if part is type(None) else _type_name(part) for part in kind.__args__
    )
