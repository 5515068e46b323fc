"""Checks of `make lint`, and size limits of the code."""

import ast
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGES = ("megatron_prepo", "checkpoints_convert")


def pinned(name: str) -> bool:
    """Return whether a package has the version that constraints.txt pins, whatever its build."""
    installed = metadata.version(name).partition("+")[0]
    return f"{name}=={installed}" in (REPOSITORY / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize(
    "command", ["ruff check .", "ruff format --check .", "mypy", "lint-imports"]
)
def test_the_code_passes(command):
    name, *words = command.split()
    if name == "lint-imports" and sys.version_info < (3, 11):
        pytest.skip("import-linter needs Python 3.11")
    if name == "mypy" and not pinned("torch"):
        # mypy 2.4.1 ends with an internal error on the annotations of torch 2.15
        pytest.skip("types are checked with the pinned torch")
    script = Path(sys.executable).with_name(name)
    done = subprocess.run([script, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_functions_are_short():
    """Length is counted from `def` to the end, docstring included."""
    lengths = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for package in PACKAGES
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert statistics.median(lengths.values()) <= 8
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 25
    assert {name: lines for name, lines in lengths.items() if lines > 80} == {}


def test_few_modules_lie_at_the_packages_root():
    assert len(list((REPOSITORY / "megatron_prepo").glob("*.py"))) <= 12
