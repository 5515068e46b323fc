"""The images of docker/: linted, from pinned bases, for no root, and what is inside.

No daemon of Docker is needed, and none was used: the slow test runs the instructions of the image
for a CPU in an empty environment of this machine.
"""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import allowed_skips
import pytest

from tests.e2e.laptop import REPOSITORY
from tests.unit.repository.test_install import asked, resolved, versions

GPU, CPU = (REPOSITORY / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu"))
BOTH = pytest.mark.parametrize("file", [GPU, CPU], ids=["cuda", "cpu"])
TORCH_INDEX, TRANSFORMER_ENGINE = "TORCH_INDEX", "TRANSFORMER_ENGINE"


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return each instruction and its arguments, in one line each."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, rest in lines]


def arguments(file: Path) -> dict[str, str]:
    """Return the build arguments and their defaults."""
    return dict(rest.split("=", 1) for word, rest in instructions(file) if word == "ARG")


def sent(path: str) -> bool:
    """Return whether a file gets into the context of a build: the last rule that fits decides."""
    included = True
    parts = path.split("/")
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        rule = line.lstrip("!").split("/")
        rules = [[*["*"] * n, *rule[1:]] for n in range(9)] if rule[0] == "**" else [rule]
        if any(len(parts) >= len(words) and all(map(fnmatchcase, parts, words)) for words in rules):
            included = line.startswith("!")
    return included


@BOTH
def test_a_dockerfile_passes_hadolint(file):
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip('hadolint is not installed (pip install -e ".[dev]")')
    done = subprocess.run([hadolint, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@BOTH
def test_a_base_is_pinned_and_the_user_is_not_root(file):
    found = instructions(file)
    assert re.fullmatch(r"\S+:\S*\d\S*@sha256:[0-9a-f]{64}", dict(found)["FROM"])
    assert [rest for word, rest in found if word == "USER"] == ["10001"]
    after = found[found.index(("USER", "10001")) :]
    assert {word for word, _ in after} == {"USER", "WORKDIR", "CMD"}


@BOTH
def test_all_that_is_copied_is_there_and_gets_into_the_build(file):
    sources = [rest.split()[0] for word, rest in instructions(file) if word == "COPY"]
    assert sources and sources[-1] == "."
    for source in sources[:-1]:
        assert (REPOSITORY / source).is_file() and sent(source)


def test_the_build_gets_the_package_and_no_secret_data_or_weight():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).splitlines()
    needed = [f for f in tracked if f.startswith(("megatron_prepo/", "checkpoints_convert/"))]
    needed += ["setup.py", "pyproject.toml", "README.md", "LICENSE", "examples/laptop/prepo.yaml"]
    needed += ["examples/paper/qwen2.5-7b/model/config.json", "tools/data/prepare.py"]
    assert [file for file in needed if not sent(file)] == []
    unwanted = (".git/config", ".venv/bin/python", ".env", "runs/a/config.yaml", "data/train.jsonl")
    unwanted += ("examples/paper/qwen2.5-7b/model/model.safetensors", "id_rsa", "tests/ranks.py")
    unwanted += ("megatron_prepo/__pycache__/cli.pyc", "tools/data/__pycache__/prepare.pyc")
    assert [file for file in unwanted if sent(file)] == []


def test_the_gpu_image_installs_the_lock_of_its_cuda():
    found = dict(instructions(GPU))
    [installed] = [rest for _, rest in instructions(GPU) if "--require-hashes" in rest]
    assert installed.endswith("--requirement locks/cuda-13.txt")
    lock = versions((REPOSITORY / "locks" / "cuda-13.txt").read_text())
    [cuda] = re.findall(r"cuda:([\d.]+)-cudnn-devel", found["FROM"])
    assert str(lock["cuda-toolkit"]).startswith(cuda)


def test_the_pin_of_transformer_engine_is_that_of_the_page():
    page = (REPOSITORY / "docs" / "install.md").read_text()
    pin = arguments(GPU)[TRANSFORMER_ENGINE]
    assert f"transformer-engine[pytorch,core_cu13]=={pin}" in page
    assert f"transformer-engine[pytorch,core_cu12]=={pin}" in page


@pytest.mark.parametrize(("name", "core"), [("cuda-13", "core_cu13"), ("cuda-12.8", "core_cu12")])
def test_transformer_engine_is_built_with_ninja(name, core):
    """Torch compiles one file at a time without it, whatever MAX_JOBS is."""
    page = (REPOSITORY / "docs" / "install.md").read_text().splitlines()
    [line] = [line for line in page if line.startswith("    pip install") and core in line]
    lock = versions((REPOSITORY / "locks" / f"{name}.txt").read_text())
    assert ("ninja" in lock) != (" ninja " in line)


@pytest.fixture
def index():
    if allowed_skips.no_index():
        pytest.skip("no answer from the package index")


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["linux-x86_64", "linux-arm64"])
def test_what_the_cpu_image_installs_resolves(index, machine):
    extras = arguments(CPU)["EXTRAS"].split(",")
    found = resolved(machine, "3.12", asked(*extras), "--constraint", "constraints.txt")
    pins = versions((REPOSITORY / "constraints.txt").read_text())
    for name in ("torch", "transformers", "gguf", "accelerate"):
        assert found[name] == pins[name]


@pytest.mark.slow
def test_the_instructions_of_the_cpu_image_make_an_environment_that_works(index, tmp_path):
    """Its `RUN` lines of pip, with what a build would be sent, in an empty environment."""
    if allowed_skips.no_python_3_12():
        pytest.skip("no python3.12")
    tracked = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).splitlines()
    for name in filter(sent, tracked):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, tmp_path / "src" / name)
    subprocess.run(["python3.12", "-m", "venv", tmp_path / "venv"], check=True)
    values = arguments(CPU) | {TORCH_INDEX: "https://pypi.org/simple"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= values | {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}"}
    for word, rest in instructions(CPU):
        if word == "RUN" and rest.startswith("pip install"):
            run(["sh", "-c", rest], tmp_path / "src", environment)
    run(["pip", "check"], tmp_path, environment)
    short = ["train.total_steps=1", "eval.max_prompts=16"]
    run(["megatron-prepo", "demo", *short], tmp_path, environment)


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
