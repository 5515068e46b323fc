"""The tiny tasks of `examples/`, each of which has a `build.py` that describes it."""

import importlib

from tiny_base import Task

TASKS = ("laptop", "traces", "lists")


def load(name: str) -> Task:
    """Return the task that `examples/<name>/build.py` builds."""
    return importlib.import_module(f"{name}.build").TASK
