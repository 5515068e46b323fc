"""Verifiable rewards: pure functions from a completion's text and the answer to a number.

They run in processes of their own (`pool`), which import them by name and nothing else of this
project: what is in this package must not import torch.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

from megatron_prepo.errors import UserError

FUNCTIONS = {
    "final_number": "megatron_prepo.rewards.final_number:final_number",
    "math": "megatron_prepo.rewards.math:boxed_answer",
}
"""What `reward.function` names, as module:function."""


def check_name(function: str) -> None:
    """UserError unless `reward.function` is in FUNCTIONS or has the form `FILE.py:FUNCTION`."""
    file, _, name = function.rpartition(":")
    if function not in FUNCTIONS and not (file.endswith(".py") and name.isidentifier()):
        raise UserError(
            f"reward.function={function} is none of {', '.join(FUNCTIONS)}, and not of the form "
            "FILE.py:FUNCTION"
        )


def check_file(function: str) -> None:
    """UserError unless the file that `reward.function` names, if any, is there."""
    file = function.rpartition(":")[0]
    if function not in FUNCTIONS and not Path(file).is_file():
        raise UserError(f"reward.function={function}: no such file: {file}")


def load(name: str) -> Callable[[str, str], float]:
    """The function of completion and answer that `reward.function` names.

    `FILE.py:FUNCTION` runs the file, and raises whatever it raises.
    """
    module_name, _, function = FUNCTIONS.get(name, name).rpartition(":")
    if name in FUNCTIONS:
        return getattr(importlib.import_module(module_name), function)
    spec = importlib.util.spec_from_file_location("reward_function", module_name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)
