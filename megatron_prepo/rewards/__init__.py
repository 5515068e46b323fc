"""Verifiable rewards: pure functions of a completion's text and the answer that return a number.

They run in grading processes (`pool`) that import them by name and nothing else of this project:
modules of this package must not import torch.
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
"""Built-in values of `reward.function`, as module:function."""
ARGUMENTS = ("completion", "answer")
"""Positional arguments of a reward function."""
MODULE = "__reward_file__"
"""Module name of a user's file; no module next to the file can have this name."""


def check_name(function: str) -> None:
    """Raise UserError unless a name is in FUNCTIONS or has the form `FILE.py:FUNCTION`."""
    file, _, name = function.rpartition(":")
    if function not in FUNCTIONS and not (file.endswith(".py") and name.isidentifier()):
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

    `FILE.py:FUNCTION` runs the file like a script: modules in its directory can be imported.
    Raises UserError for a file that fails, with the line, and for a function with another
    signature; a MemoryError is not converted.
    """
    place, _, function = FUNCTIONS.get(name, name).rpartition(":")
    if name in FUNCTIONS:
        return getattr(importlib.import_module(place), function)
    module = _run_file(Path(place))
    if function not in vars(module):
        own = [
            n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")
        ]
        raise UserError(
            f"{place} has no function {function!r}; its functions: {', '.join(own[:9]) or 'none'}"
        )
    check_function(getattr(module, function), name)
    return getattr(module, function)


ANSWERS = ("answer", "ground_truth", "gt", "label", "target", "reference", "gold", "solution")
COMPLETIONS = ("completion", "completions", "solution_str", "response", "output", "generation")
"""Parameter names that show which of the two arguments a user expects."""


def check_function(function: object, name: str) -> None:
    """Raise UserError unless a function can be called with `ARGUMENTS` and may return a number."""
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
    except ValueError:  # written in C, without a signature
        return
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


def _run_file(file: Path):
    """Import a user's file.  Dataclasses and pickles look up the module in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(MODULE, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except MemoryError:  # a message may need more memory than remains
        raise
    except (Exception, SystemExit) as error:  # any error of a user's file is reported to the user
        raise UserError(f"{_place_of(error, file)}: {type(error).__name__}: {error}") from error
    return module


def _place_of(error: BaseException, file: Path) -> str:
    """Return file and line of an error: the innermost frame in the user's directory, or the line
    that does not parse.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    folder = str(file.resolve().parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if str(Path(f.filename).resolve()).startswith(folder)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else str(file)
