"""A test that is skipped where it should run fails; allowed skips are listed in one place."""

import subprocess
import sys

import allowed_skips
import pytest

from tests.e2e.laptop import REPOSITORY

SKIPS = """
import pytest

def test_a_kernel():
    pytest.skip("this torch lacks a keyword")

@pytest.mark.skipif(True, reason="marked")
def test_marked():
    pass

@pytest.fixture
def absent():
    pytest.importorskip("no_such_package")

def test_by_its_fixture(absent):
    pass

@pytest.mark.xfail(reason="known")
def test_known():
    assert False

def test_runs():
    pass
"""
HOOKS = "from tests.conftest import pytest_addoption, pytest_configure\n"


def run(directory, *words: str) -> subprocess.CompletedProcess:
    """Run pytest with our hooks on the files below `directory`."""
    (directory / "conftest.py").write_text(HOOKS)
    (directory / "pytest.ini").write_text("[pytest]")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *words],
        cwd=directory,
        env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_skips_that_are_not_allowed_fail_whoever_skips(tmp_path):
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.skip('no', True)")
    (tmp_path / "package").mkdir()  # outside the reach of the tests' conftest.py
    (tmp_path / "package" / "module.py").write_text('""">>> 1  # doctest: +SKIP\n2\n"""')
    words = ["--doctest-modules", "--continue-on-collection-errors", "-n", "2", "--dist=loadfile"]
    done = run(tmp_path, "--only-allowed-skips", *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "skipped where it should run: Skipped: this torch lacks a keyword" in done.stdout
    for test in ("test_a_kernel", "test_marked", "test_by_its_fixture", "test_known"):
        assert f"PASSED test_skips.py::{test}" not in done.stdout
    assert "1 passed" in done.stdout and "skipped," not in done.stdout
    assert "ERROR test_whole.py" in done.stdout


def test_without_the_option_a_skip_is_a_skip(tmp_path):
    (tmp_path / "test_skips.py").write_text(SKIPS)
    done = run(tmp_path)
    assert done.returncode == 0 and "1 passed, 3 skipped, 1 xfailed" in done.stdout


@pytest.mark.parametrize("cuda", [False, True])
def test_a_gpus_test_is_skipped_only_where_there_is_none(monkeypatch, cuda):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    fault = allowed_skips.fault("tests/gpu/test_on_a_gpu.py::test_kernels[1]", "lacks a keyword")
    assert bool(fault) == cuda
    if cuda:
        assert "lacks a keyword" in fault and "no_gpu: they need a CUDA device" in fault


@pytest.mark.parametrize(("system", "allowed"), [("Linux", False), ("Darwin", True)])
def test_without_triton_kernels_are_skipped_where_it_has_no_wheel(monkeypatch, system, allowed):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    test = "tests/unit/actor/test_lm_head_kernels.py::test_statistics[triton-7-1.0]"
    assert (allowed_skips.fault(test, "could not import 'triton'") == "") == allowed
    other = "tests/unit/actor/test_lm_head_kernels.py::test_statistics[torch-7-1.0]"
    assert allowed_skips.fault(other, "for no reason")


def test_what_make_sets_up_is_not_skipped_for_want_of_it(monkeypatch):
    monkeypatch.setattr(allowed_skips, "others_run", lambda: True)
    for test in ("e2e/test_launch.py::test_a_job", "real_sglang/test_routing.py::test_the_actor"):
        assert allowed_skips.fault(f"tests/{test}", "it is not installed")
    monkeypatch.setattr(allowed_skips, "others_run", lambda: False)
    for test in ("e2e/test_launch.py::test_a_job", "real_sglang/test_routing.py::test_the_actor"):
        assert not allowed_skips.fault(f"tests/{test}", "it is not installed")


def test_every_row_is_about_tests_that_exist():
    for row in allowed_skips.ALLOWED:
        file, _, test = row.tests.partition("::")
        files = [path for path in REPOSITORY.glob(file) if path.suffix == ".py"]
        assert files, row.tests
        name = test.partition("[")[0].strip("*")
        assert any(name in path.read_text() for path in files), row.tests


def test_make_asks_the_same_file_with_a_python_that_has_nothing():
    file = str(REPOSITORY / "tests" / "allowed_skips.py")
    done = subprocess.run([sys.executable, "-I", "-S", file], capture_output=True, text=True)
    assert done.stdout.strip() == ("yes" if allowed_skips.others_run() else "")
    assert "$(shell $(PYTHON) tests/allowed_skips.py)" in (REPOSITORY / "Makefile").read_text()
