"""Fixtures; everything in this directory uses real SGLang servers: `make test-sglang`."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sglang)


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """Interpreter that has SGLang: `SGLANG_PYTHON`, or the one that `make sglang-cpu` set up."""
    python = os.environ.get("SGLANG_PYTHON", REPOSITORY / ".venv-sglang" / "bin" / "python")
    if not Path(python).is_file():
        pytest.skip(f"no SGLang: {python} is missing; `make sglang-cpu`, or set SGLANG_PYTHON")
    return str(python)
