"""The check on a GPU machine, as far as it needs no GPU: its parts, deadlines and results."""

import json
import sys
import zipfile

import pytest

from tools.checks import gpu_check


def test_a_part_of_the_gpu_check_ends_at_its_deadline_and_keeps_its_output():
    """The part ends even if a child process still holds the output."""
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    done = gpu_check.run_within(3.0, [sys.executable, "-c", code])
    assert (done["passed"], done["ended_at_the_deadline"]) == (False, True)
    assert done["output"] == "begun\n"
    assert done["seconds"] < 30


def test_the_gpu_check_has_written_every_part_before_the_next(tmp_path):
    out = tmp_path / "new" / "check.json"

    def breaks():
        assert json.loads(out.read_text())["first"] == {"passed": True}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        gpu_check.check({"first": lambda: {"passed": True}, "second": breaks}, out)
    assert json.loads(out.read_text())["first"] == {"passed": True}
    assert gpu_check.check({"first": lambda: {"passed": False}}, out) == 1


def test_packed_packages_are_on_the_path_of_the_servers_alone(tmp_path):
    for n in (1, 2):
        with zipfile.ZipFile(tmp_path / f"sglang_{n}.zip", "w") as archive:
            archive.writestr(f"packed_{n}/__init__.py", f"number = {n}")
    python = gpu_check.unpack(tmp_path, tmp_path)
    code = "import packed_1, packed_2, torch, os; print(packed_1.number + packed_2.number)"
    done = gpu_check.run_within(60.0, [str(python), "-c", code])
    assert done["passed"] and done["output"] == "3\n"
    assert not gpu_check.run_within(60.0, [sys.executable, "-c", "import packed_1"])["passed"]
    assert gpu_check.run_sglang(None)["passed"]
