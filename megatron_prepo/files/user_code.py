"""Python files of the user's, which settings name as `FILE.py:NAME`.

A file runs like a script: modules in its directory can be imported.  Grading processes import this
module: it must not import torch.
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from megatron_prepo.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


def has_form(value: str) -> bool:
    """Return whether a value has the form `FILE.py:NAME`."""
    file, _, name = value.rpartition(":")
    return file.endswith(".py") and name.isidentifier()


def load(value: str, *, module: str, kind: str, is_kind: Callable[[object], bool]) -> object:
    """Run the file in `FILE.py:NAME` and return its object NAME.

    `module` is the name of the file's module; `kind` and `is_kind` describe what is looked for.
    Raises UserError for a missing file, one that fails (with the line), and one without the name.
    """
    place, _, name = value.rpartition(":")
    file = Path(place)
    if not file.is_file():
        raise UserError(f"no such file: {file}")
    names = vars(run(file, module))
    if name not in names:
        own = [n for n, v in names.items() if is_kind(v) and v.__module__ == module and n[0] != "_"]
        found = ", ".join(own[:9]) or "none"
        plural = f"{kind}es" if kind.endswith("s") else f"{kind}s"
        raise UserError(f"{file} has no {kind} {name!r}; its {plural}: {found}")
    return names[name]


def run(file: Path, name: str) -> ModuleType:
    """Import a file as the module `name`, which no module next to the file should have.

    Dataclasses and pickles look up the module in `sys.modules`.  Raises UserError for any error of
    the file but a MemoryError.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} is not named .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except MemoryError:  # a message may need more memory than remains
        raise
    except (Exception, SystemExit) as error:  # any error of a user's file is reported to the user
        raise UserError(described(error, file)) from error
    return module


def described(error: BaseException, file: Path) -> str:
    """Return an error of a user's code as `FILE, line N: TYPE: MESSAGE`.

    The line is that of the innermost frame in the user's directory, or the one that does not parse.
    """
    place = str(file)
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _is_users(Path(frame.filename).resolve(), file)]
        if own:
            place = f"{own[-1].filename}, line {own[-1].lineno}"
    return f"{place}: {type(error).__name__}: {error}"


def _is_users(path: Path, file: Path) -> bool:
    """Return whether a path lies in the directory of the user's file and is not installed there."""
    in_directory = path.is_relative_to(file.resolve().parent)
    return in_directory and not path.is_relative_to(PACKAGE) and "site-packages" not in path.parts
