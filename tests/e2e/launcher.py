"""Run `python -m megatron_prepo.launch` by the interpreter that has NeMo-Run."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.laptop import REPOSITORY

OWN = Path(os.environ.get("LAUNCH_PYTHON", REPOSITORY / ".venv-launch" / "bin" / "python"))
PYTHON = str(OWN) if OWN.is_file() else sys.executable
"""`LAUNCH_PYTHON`, or what `make test` sets up."""
NEEDED = pytest.mark.skipif(
    not OWN.is_file() and importlib.util.find_spec("nemo_run") is None,
    reason="NeMo-Run is not installed (make .venv-launch/ready)",
)


def python(*words: str, home: Path, given: str = "", **variables: str):
    # the ranks run in this environment, which has torch but no NeMo-Run
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [PYTHON, *words],
        cwd=REPOSITORY,
        env=os.environ
        | {"PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}", "PATH": path}
        | {"NEMORUN_HOME": str(home), "OMP_NUM_THREADS": "1", **variables},
        input=given,
        capture_output=True,
        text=True,
        timeout=900,
    )


def launch(*words: str, home: Path, **variables: str) -> subprocess.CompletedProcess:
    return python("-m", "megatron_prepo.launch", *words, home=home, **variables)


@functools.cache
def has(package: str) -> bool:
    """Return whether the launching interpreter has the package."""
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec('{package}') is None)"
    return not subprocess.run([PYTHON, "-c", code], timeout=60).returncode
