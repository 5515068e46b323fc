"""Verifiable rewards: pure functions from a completion's text and the answer to a number.

They run in processes of their own (`pool`), which import them by name and nothing else of this
project: what is in this package must not import torch.
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from megatron_prepo.errors import UserError

FUNCTIONS = {
    "final_number": "megatron_prepo.rewards.final_number:final_number",
    "math": "megatron_prepo.rewards.math:boxed_answer",
}
"""What `reward.function` names, as module:function."""
ARGUMENTS = ("completion", "answer")
"""What a reward function is called with, by position."""
MODULE = "__reward_file__"
"""The name of a user's file as a module; no module beside it can have it."""


def check_name(function: str) -> None:
    """UserError unless `reward.function` is in FUNCTIONS or has the form `FILE.py:FUNCTION`."""
    file, _, name = function.rpartition(":")
    if function not in FUNCTIONS and not (file.endswith(".py") and name.isidentifier()):
        raise UserError(
            f"reward.function={function} is none of {', '.join(FUNCTIONS)}, and not of the form "
            "FILE.py:FUNCTION"
        )


def check_file(function: str) -> None:
    """Raise UserError unless `reward.function` has a known form and its file, if any, exists."""
    check_name(function)
    file = function.rpartition(":")[0]
    if function not in FUNCTIONS and not Path(file).is_file():
        raise UserError(f"reward.function={function}: no such file: {file}")


def load(name: str) -> Callable[[str, str], float]:
    """The function of completion and answer that `reward.function` names.

    `FILE.py:FUNCTION` runs the file as a script would run: modules beside it can be imported.
    Raises UserError for a file that fails, with the line, and a function that cannot be called so;
    a MemoryError as it is.
    """
    place, _, function = FUNCTIONS.get(name, name).rpartition(":")
    if name in FUNCTIONS:
        return getattr(importlib.import_module(place), function)
    module = _run_file(Path(place))
    if function not in vars(module):
        own = [
            n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")
        ]
        raise UserError(f"{place} has no function {function!r}, but {', '.join(own[:9]) or 'none'}")
    check_function(getattr(module, function), name)
    return getattr(module, function)


ANSWERS = ("answer", "ground_truth", "gt", "label", "target", "reference", "gold", "solution")
COMPLETIONS = ("completion", "completions", "solution_str", "response", "output", "generation")
"""How parameters are called that a user means as the one or the other."""


def check_function(function: object, name: str) -> None:
    """UserError unless this can be called with `ARGUMENTS` and may return a number."""
    contract = f"a reward function takes ({', '.join(ARGUMENTS)}) and returns a number"
    if not callable(function):
        raise UserError(f"{name} is a {type(function).__name__}; {contract}")
    if inspect.isclass(function):
        raise UserError(f"{name} is a class; {contract}")
    for kind, is_one in (
        ("a coroutine function", inspect.iscoroutinefunction),
        ("an async generator function", inspect.isasyncgenfunction),
        ("a generator function", inspect.isgeneratorfunction),
    ):
        if is_one(function) or is_one(getattr(function, "__call__", None)):  # noqa: B004
            raise UserError(f"{name} is {kind}; {contract}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, and not described
        return
    try:
        signature.bind(*ARGUMENTS)
    except TypeError as error:
        raise UserError(f"{name}{signature} does not fit ({error}); {contract}") from None
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind in by_place]
    if (names[:1] and names[0] in ANSWERS) or (names[1:] and names[1] in COMPLETIONS):
        raise UserError(
            f"{name}{signature} takes them the other way round: arguments go by their place; "
            f"{contract}"
        )


def _run_file(file: Path):
    """The module of a user's file.  Dataclasses and pickles look for it in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(MODULE, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except MemoryError:  # there may be no memory left to describe it
        raise
    except (Exception, SystemExit) as error:  # whatever a user's file raises is for them to read
        raise UserError(f"{_place_of(error, file)}: {type(error).__name__}: {error}") from error
    return module


def _place_of(error: BaseException, file: Path) -> str:
    """File and line of the error: the last one of the user's folder that ran, or does not parse."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    folder = str(file.resolve().parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if str(Path(f.filename).resolve()).startswith(folder)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else str(file)
