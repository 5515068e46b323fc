"""The check on a GPU machine, rehearsed without one, with only what is there and what is carried.

The machine's environment has torch, transformers, the packages that pack_gpu.py relies on, and what
these require; carried packages are on a separate path, and the repository is a copy of its tracked
files.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_prepo.files import ownership
from tools.checks import pack_gpu
from tools.checks.gpu_parts import APART, PARTS

REPOSITORY = Path(__file__).resolve().parents[2]
ON_THE_MACHINE = ("torch", "triton", "transformers", *pack_gpu.BROUGHT_BY_THE_MACHINE)
NOT_REHEARSED = ("liger-kernel",)
"""Carried, but used on a GPU only."""


def distribution(name: str) -> importlib.metadata.Distribution | None:
    """Return an installed distribution; None for one that this system does not have (Triton)."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def with_requirements(names) -> set[str]:
    """Return the names of installed distributions, with all that they require."""
    found, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found or (package := distribution(name)) is None:
            continue
        found.add(name)
        needs = [Requirement(line) for line in package.requires or []]
        left += [n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    return found


def link(names, folder: Path) -> None:
    """Link the files of distributions into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        package = distribution(name)
        entries = {file.parts[0] for file in package.files} - {"..", "__pycache__"}
        for entry in entries - {path.name for path in folder.iterdir()}:
            (folder / entry).symlink_to(package.locate_file(entry))


def machine(folder: Path) -> list[str]:
    """Return a command's beginning that runs a Python of such a machine in a copy of this."""
    carried = {re.split("==", package)[0] for package in pack_gpu.PACKAGES} - {*NOT_REHEARSED}
    venv.create(folder / "machine")
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "machine")})
    link(with_requirements(ON_THE_MACHINE) - carried, Path(site))
    link(carried, folder / "site")
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY).split(b"\0"):
        if name and (source := REPOSITORY / os.fsdecode(name)).is_file():
            target = folder / "copy" / os.fsdecode(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return ["env", f"PYTHONPATH={folder / 'site'}", str(folder / "machine" / "bin" / "python")]


@pytest.fixture
def rehearse(tmp_path):
    """Return a function that rehearses with some options, with results in tmp_path / "out"."""
    command = [*machine(tmp_path), "tools/checks/gpu_check.py", "--rehearse"]
    command += ["--out", str(tmp_path / "out")]

    def run(*words: str) -> str:
        options = {"cwd": tmp_path / "copy", "capture_output": True, "text": True}
        done = subprocess.run([*command, *words], **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_gpu_tests_are_found_with_what_is_carried(rehearse, tmp_path):
    """All libraries are imported for this."""
    rehearse("--parts", "tests", "--budget", "120")
    assert json.loads((tmp_path / "out" / "tests.json").read_text())["passed"]


@pytest.mark.slow
def test_everything_with_what_is_carried(rehearse, tmp_path):
    printed = rehearse("--budget", "540")
    parts = [name for name in PARTS if name not in APART]
    out = tmp_path / "out"
    names = {*(f"{p}.json" for p in parts), "summary.md", ownership.MARKER}
    assert {path.name for path in out.iterdir()} == names
    assert len(list(out.iterdir())) <= 8
    for name in parts:
        assert json.loads((out / f"{name}.json").read_text())["passed"], name
    assert printed.endswith((out / "summary.md").read_text())
    assert "at most" not in rehearse("--budget", "1"), "every part has a result"
