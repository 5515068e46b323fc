"""Verifiable rewards: pure functions of a completion's text and the answer that return a number.

They run in grading processes (`pool`) that import them by name and nothing else of this project:
modules of this package must not import torch.
"""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

from megatron_prepo.errors import UserError
from megatron_prepo.files import user_code

FUNCTIONS = {
    "final_number": "megatron_prepo.rewards.final_number:final_number",
    "math": "megatron_prepo.rewards.math:boxed_answer",
}
"""Built-in values of `reward.function`, as module:function."""
ARGUMENTS = ("completion", "answer")
"""Positional arguments of a reward function."""
MODULE = "__reward_file__"
"""Module name of a user's file; no module next to the file can have this name."""


def check_name(function: str) -> None:
    """Raise UserError unless a name is in FUNCTIONS or has the form `FILE.py:FUNCTION`."""
    if function not in FUNCTIONS and not user_code.has_form(function):
        raise UserError(
            f"reward.function={function} is neither one of {', '.join(FUNCTIONS)} nor of the form "
            "FILE.py:FUNCTION"
        )


def check_file(function: str) -> None:
    """Raise UserError unless `reward.function` has a known form and its file, if any, exists."""
    check_name(function)
    file = function.rpartition(":")[0]
    if function not in FUNCTIONS and not Path(file).is_file():
        raise UserError(f"reward.function={function}: no such file: {file}")


def load(name: str) -> Callable[[str, str], float]:
    """Return the function of completion and answer that `reward.function` names.

    Raises UserError for a file that fails, with the line, and for a function with another
    signature; a MemoryError is not converted.
    """
    if name in FUNCTIONS:
        place, _, function_name = FUNCTIONS[name].rpartition(":")
        built_in: Callable[[str, str], float] = getattr(
            importlib.import_module(place), function_name
        )
        return built_in
    function = user_code.load(name, module=MODULE, kind="function", is_kind=inspect.isfunction)
    return checked_function(function, name)


ANSWERS = ("answer", "ground_truth", "gt", "label", "target", "reference", "gold", "solution")
COMPLETIONS = ("completion", "completions", "solution_str", "response", "output", "generation")
"""Parameter names that show which of the two arguments a user expects."""


def checked_function(function: object, name: str) -> Callable[[str, str], float]:
    """Return a function that can be called with `ARGUMENTS` and may return a number.

    Raises UserError for anything else.
    """
    contract = f"a reward function takes ({', '.join(ARGUMENTS)}) and returns a number"
    if not callable(function):
        raise UserError(f"{name} is a {type(function).__name__}; {contract}")
    if kind := _other_kind(function):
        raise UserError(f"{name} is {kind}; {contract}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return function
    try:
        signature.bind(*ARGUMENTS)
    except TypeError as error:
        raise UserError(f"{name}{signature} does not fit ({error}); {contract}") from None
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in by_place]
    if (names[:1] and names[0] in ANSWERS) or (names[1:] and names[1] in COMPLETIONS):
        raise UserError(
            f"{name}{signature} has its parameters in the opposite order: arguments are passed by "
            f"position; {contract}"
        )
    return function


def _other_kind(function: Callable[..., object]) -> str | None:
    """Return what a callable is, with its article, if it cannot be a reward function."""
    if inspect.isclass(function):
        return "a class"
    for kind, is_one in (
        ("a coroutine function", inspect.iscoroutinefunction),
        ("an async generator function", inspect.isasyncgenfunction),
        ("a generator function", inspect.isgeneratorfunction),
    ):
        if is_one(function) or is_one(getattr(function, "__call__", None)):  # noqa: B004
            return kind
    return None
