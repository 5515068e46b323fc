"""The source distribution and the wheel: contents, metadata, and what works once installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = [
    path.relative_to(REPOSITORY)
    for path in (REPOSITORY / "megatron_prepo" / "compare").rglob("*.*")
    if path.suffix in (".html", ".css", ".js")
]
"""Templates, styles and script of the report's page."""
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(*command, cwd, **environment) -> str:
    """Return the output of a command that sees no module of the repository."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Source distribution, built from a copy, in which weights lie next to an architecture."""
    copy, out = tmp_path_factory.mktemp("copy") / "tree", tmp_path_factory.mktemp("sdist")
    copy.mkdir()
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY).split(b"\0"):
        source = REPOSITORY / os.fsdecode(name)
        if name and source.is_file() and not name.startswith(b"tests/"):
            (copy / os.fsdecode(name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy / os.fsdecode(name))
    (copy / "examples/paper/qwen3-4b/model/model.safetensors").write_bytes(b"gigabytes")
    return out / run(sys.executable, "-c", BUILD, out, cwd=copy).split()[-1]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Wheel, built from the source distribution."""
    out = tmp_path_factory.mktemp("wheel")
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", out]
    run(*PIP, "wheel", *offline, sdist, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Environment with the wheel, and this one's packages as its requirements."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    packages = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place
    )
    shared = Path(packages.strip()) / "shared.pth"
    shared.write_text(sysconfig.get_path("purelib") + "\n")
    return place


def test_the_source_distribution_builds_everything_and_has_no_weights(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "constraints.txt", "docs/index.md", "docs/demo.png"} <= names
    assert {"examples/laptop/build.py", "examples/laptop/base/model.safetensors"} <= names
    assert "examples/paper/qwen3-4b/model/config.json" in names
    assert "examples/paper/qwen3-4b/model/model.safetensors" not in names


def test_the_wheel_has_the_examples_and_the_servers_stand_ins(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.getinfo("megatron_prepo/examples/laptop/base/model.safetensors").file_size
    for folder in ("paper", "cluster"):
        for path in REPOSITORY.glob(f"examples/{folder}/*/*.yaml"):
            assert f"megatron_prepo/{path.relative_to(REPOSITORY)}" in names
    assert "megatron_prepo/examples/paper/qwen3-4b/model/config.json" in names
    assert "megatron_prepo/examples/paper/qwen3-4b/model/model.safetensors" not in names
    assert "megatron_prepo/rollout/sglang/on_cpu/sitecustomize.py" in names
    assert len(PAGE) == 7 and set(map(str, PAGE)) <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "megatron_prepo",
        "checkpoints_convert",
    }


def test_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
        assert any(n.endswith("/LICENSE") for n in archive.namelist())
    assert metadata["Name"] == "megatron-prepo"
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(">=3.10,<3.14")
    assert "Apache-2.0" in (metadata["License"] or "", metadata["License-Expression"] or "")
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True).decode()
    assert description.strip() == (REPOSITORY / "README.md").read_text().strip()
    assert "Paper, https://arxiv.org/abs/2511.00794" in metadata.get_all("Project-URL")
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{n}" for n in (10, 11, 12, 13)} <= {*classifiers}


def test_the_installed_wheel_reads_its_recipes(installed, tmp_path):
    command, python = installed / "bin" / "megatron-prepo", installed / "bin" / "python"
    for words in (["--help"], ["train", "--help"]):
        assert "usage: megatron-prepo" in run(command, *words, cwd=tmp_path)
    code = (
        "from megatron_prepo import config; from megatron_prepo.launch import recipes\n"
        "for name, path in recipes.recipes().items():\n"
        "    config.load(path, ['rollout.engine=sglang']); print(name, path)"
    )
    lines = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert len(lines) == len([*REPOSITORY.glob("examples/[pc][al]*/*/*.yaml")]) > 10
    assert all(str(installed) in line for line in lines)


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo(installed, tmp_path):
    short = ["train.total_steps=2", "eval.max_prompts=8", "eval.every=0"]
    out = run(installed / "bin" / "megatron-prepo", "demo", *short, cwd=tmp_path)
    assert "by transformers alone" in out
    assert (tmp_path / "runs" / "demo" / "hf" / "model.safetensors").is_file()
