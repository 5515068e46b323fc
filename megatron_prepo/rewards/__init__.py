"""Verifiable rewards: pure functions of a completion that return a number, or a dict with one.

A function takes completion and answer by position; what else it needs, it asks for by name, as
keyword-only parameters:

    def reward(completion, answer): ...
    def reward(completion, *, record): ...
    def reward(completion, answer, *, num_tokens, finished): ...

They run in grading processes (`pool`) that import them by name and nothing else of this project:
modules of this package must not import torch.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_prepo.errors import UserError
from megatron_prepo.files import user_code

FUNCTIONS = {
    "final_number": "megatron_prepo.rewards.final_number:final_number",
    "math": "megatron_prepo.rewards.math:boxed_answer",
    "reasoning_gym": "megatron_prepo.rewards.reasoning_gym:task_score",
}
"""Built-in values of `reward.function`, as module:function."""
EXTRAS = {"reasoning_gym": 'pip install -e ".[tasks]"'}
"""Commands that install what a built-in function needs besides this package."""
ARGUMENTS = ("completion", "answer")
"""Positional arguments of a reward function; the second may be absent if it asks for others."""
BY_NAME = ("record", "num_tokens", "finished")
"""Arguments that a function may ask for by name: the prompt's line as a dict, the number of tokens
of the completion (its end token included), and whether it ended with a stop token,
before `rollout.max_new_tokens`."""
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


def load(name: str) -> Callable[..., Any]:
    """Return the function that `reward.function` names; `arguments` lists what it takes.

    Raises UserError for a file that fails, with the line, and for a function with another
    signature; a MemoryError is not converted.
    """
    if name in FUNCTIONS:
        place, _, function_name = FUNCTIONS[name].rpartition(":")
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            if name not in EXTRAS:
                raise
            raise UserError(f"{name} needs a package ({error}): {EXTRAS[name]}") from error
        built_in: Callable[..., Any] = getattr(module, function_name)
        return built_in
    function = user_code.load(name, module=MODULE, kind="function", is_kind=inspect.isfunction)
    return checked_function(function, name)


ANSWERS = ("answer", "ground_truth", "gt", "label", "target", "reference", "gold", "solution")
COMPLETIONS = ("completion", "completions", "solution_str", "response", "output", "generation")
"""Parameter names that show which of the two arguments a user expects."""


CONTRACT = (
    f"a reward function takes ({', '.join(ARGUMENTS)}) and returns a number; it may ask for "
    f"{', '.join(BY_NAME)} by name, as in (completion, *, record)"
)


def checked_function(function: object, name: str) -> Callable[..., Any]:
    """Return a function that can be called with its `arguments` and may return a number.

    Raises UserError for anything else.
    """
    if not callable(function):
        raise UserError(f"{name} is a {type(function).__name__}; {CONTRACT}")
    if kind := _other_kind(function):
        raise UserError(f"{name} is {kind}; {CONTRACT}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, without a signature
        return function
    _check_order(signature, name)
    takes = arguments(function)
    try:
        signature.bind(
            *(argument for argument in ARGUMENTS if argument in takes),
            **{argument: None for argument in BY_NAME if argument in takes},
        )
    except TypeError as error:
        raise UserError(f"{name}{signature} does not fit ({error}); {CONTRACT}") from None
    return function


def arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return those of `ARGUMENTS` and `BY_NAME` that a function is called with.

    >>> arguments(lambda text, gold: 0.0), arguments(lambda completion, *, record: 0.0)
    (('completion', 'answer'), ('completion', 'record'))
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C, without a signature
        return ARGUMENTS
    named = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    by_name = tuple(name for name in BY_NAME if name in named)
    one_place = len(_by_place(parameters)) == 1
    any_number = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return (*(ARGUMENTS[:1] if by_name and one_place and not any_number else ARGUMENTS), *by_name)


def _by_place(parameters: Iterable[inspect.Parameter]) -> list[str]:
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in places]


def _check_order(signature: inspect.Signature, name: str) -> None:
    """Raise UserError if names of positional parameters show that others are expected there."""
    names = _by_place(signature.parameters.values())
    if (names[:1] and names[0] in ANSWERS) or (names[1:] and names[1] in COMPLETIONS):
        raise UserError(
            f"{name}{signature} has its parameters in the opposite order: arguments are passed by "
            f"position; {CONTRACT}"
        )
    if by_place := [argument for argument in BY_NAME if argument in names]:
        raise UserError(
            f"{name}{signature} takes {by_place[0]} by position: put a * before it; {CONTRACT}"
        )


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
