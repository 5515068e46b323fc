"""Checked use and replacement of internals of other libraries.

A release may drop a function that is not part of the public interface, or call it with one more
argument.  `replace` and `require` detect that before any code relies on it, and report the library,
its version and the difference.  Only the standard library is imported, since the servers' processes
use this module, too (`rollout/sglang/on_cpu`).
"""

import importlib.metadata
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, NoReturn

from megatron_prepo.errors import UserError

TRIED = {
    "torch": ("torch", "2.11.0 to 2.15.0"),
    "transformers": ("transformers", "5.6.0 to 5.24.0"),
    "megatron": ("megatron-core", "0.16.1 to 0.19.2"),
    "sglang": ("sglang", "0.5.11 to 0.5.23"),
    "nemo_run": ("nemo_run", "0.11.1"),
}
"""Distribution and tried releases of each module whose internals we rely on."""


def replace(owner: Any, name: str, replacement: Any) -> Any:
    """Replace `owner.name` by `replacement`, and return the original.

    `owner` is a module, a class or an object.  Raises UserError if the original is missing or, for
    a function, has another signature (`require_form`).
    """
    require(owner, name)
    original = getattr(owner, name)
    if inspect.isroutine(replacement):
        require_form(owner, name, replacement)
    setattr(owner, name, replacement)
    return original


def require(owner: Any, *names: str) -> None:
    """Raise UserError unless `owner`, a module, a class or an object, has these attributes."""
    for name in names:
        if not hasattr(owner, name):
            _refuse(owner, f"{_path(owner)} has no {name}")


def require_form(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Raise UserError unless `replacement` can be called in place of `owner.name`.

    It must accept every call (`*args, **kwargs`), and its named parameters must have the same
    position in the original and, unless they are positional-only, the same name.
    """
    require(owner, name)
    ours = inspect.signature(replacement).parameters.values()
    rest = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    assert rest <= {p.kind for p in ours}, f"the replacement of {name} needs *args and **kwargs"
    try:
        signature = inspect.signature(getattr(owner, name))
    except TypeError:
        _refuse(owner, f"{_path(owner)}.{name} is not a function")
    except ValueError:  # written in C, without a signature
        return
    theirs = [p.replace(annotation=Parameter.empty) for p in signature.parameters.values()]
    for index, parameter in enumerate(p for p in ours if p.kind not in rest):
        at_place = [p for p in theirs[index : index + 1] if p.kind is not Parameter.KEYWORD_ONLY]
        if parameter.kind is not Parameter.POSITIONAL_ONLY:
            at_place = [p for p in at_place if p.name == parameter.name]
        if not at_place:
            call = signature.replace(parameters=theirs, return_annotation=Parameter.empty)
            _refuse(
                owner,
                f"argument {index + 1} of {_path(owner)}.{name}{call} is not {parameter.name}",
            )


def explain(error: ImportError) -> UserError | None:
    """Return the error of a failed import from a library whose internals we rely on.

    None for other libraries, and for one that is not installed.
    """
    module = (error.name or "").split(".")[0]
    return _refusal(module, str(error)) if module in TRIED and _version(module) else None


def _refuse(owner: Any, difference: str) -> NoReturn:
    raise _refusal(_path(owner).split(".")[0], difference)


def _refusal(module: str, difference: str) -> UserError:
    library, tried = TRIED.get(module, (module, "none"))
    return UserError(
        f"{library} {_version(module) or 'of unknown version'} is not supported: {difference}, and "
        f"megatron_prepo relies on it; versions that were tried: {tried}"
    )


def _version(module: str) -> str | None:
    try:
        return importlib.metadata.version(TRIED.get(module, (module,))[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def _path(owner: Any) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    kind = owner if inspect.isclass(owner) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}"
