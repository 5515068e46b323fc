"""Completion of command lines by the shell (argcomplete; docs/install.md has how to turn it on)."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megatron_prepo.config.schema import SELECTION_METHODS, Config, FilePath


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the argument `overrides`, any number of `key=value`, which the shell can complete."""
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to override"
    )
    overrides.completer = complete_override  # type: ignore[attr-defined]


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Write the completions of a command line and exit, if that is what the shell started us for.

    argcomplete is imported only then.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return
    from argcomplete.finders import CompletionFinder

    class Finder(CompletionFinder):
        def collect_completions(
            self, active_parsers: Any, parsed_args: argparse.Namespace, cword_prefix: str
        ) -> list[str]:
            found: list[str] = super().collect_completions(
                active_parsers, parsed_args, cword_prefix
            )
            awaited = any(
                action.option_strings and action.nargs != 0
                for parser in active_parsers
                for action in parser.active_actions
            )
            # argparse knows of no overrides after an option
            if not found and not awaited and "overrides" in parsed_args:
                found = [o for o in complete_override(cword_prefix) if o.startswith(cword_prefix)]
            return found

    Finder()(parser)


def one_of_list(known: Iterable[str]) -> Callable[..., list[str]]:
    """Return a completer of the last one of several names with commas.

    >>> one_of_list(["random", "prepo"])("prepo,ran")
    ['prepo,random', 'prepo,prepo']
    """

    def complete(prefix: str, **_: Any) -> list[str]:
        before = prefix.rpartition(",")[0]
        return [f"{before},{name}" if before else name for name in known]

    return complete


def complete_override(prefix: str, **_: Any) -> list[str]:
    """Return `section.name=` of all settings; after `=`, the setting's choices or files.

    >>> [word for word in complete_override("") if word.startswith("train.tot")]
    ['train.total_steps=']
    >>> complete_override("rollout.engine=s")
    ['rollout.engine=embedded', 'rollout.engine=sglang']
    """
    kinds = {
        f"{section.name}.{field.name}": field.type
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
        for field in dataclasses.fields(section.type)
    }
    name, equals, value = prefix.partition("=")
    if not equals:
        return [f"{known}=" for known in kinds]
    if name == "selection.method":
        return [f"{name}={method}" for method in SELECTION_METHODS]
    return [f"{name}={word}" for word in _values(kinds.get(name), value)]


def _values(kind: Any, prefix: str) -> list[str]:
    """Return what a setting of this type may be: choices, and files that begin with `prefix`."""
    words: list[str] = []
    for part in get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]:
        if part is bool:
            words += ["true", "false"]
        elif get_origin(part) is Literal:
            words += map(str, get_args(part))
        elif part == FilePath:
            words += _files(prefix)
    return words


def _files(prefix: str) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter()(prefix))
