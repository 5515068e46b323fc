"""Every file that a rank will read is opened before one is started."""

import os
import shutil
from pathlib import Path

import pytest

from checkpoints_convert.convert import import_hf
from megatron_prepo import config
from megatron_prepo.errors import UserError
from megatron_prepo.inputs import preflight

LAPTOP = Path(__file__).resolve().parents[3] / "examples" / "laptop"
HF_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
MEGATRON_FILES = ("__0_0.distcp", ".metadata", "common.pt", "metadata.json")
FILES = [
    *(f"base/{name}" for name in HF_FILES),
    *(f"megatron/release/{name}" for name in MEGATRON_FILES),
    "megatron/latest_checkpointed_iteration.txt",
    *("train.jsonl", "eval.jsonl", "reward.py"),
]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    match how:
        case "a directory":
            path.mkdir()
        case "a link to nowhere":
            path.symlink_to("nowhere")
        case "a link to itself":
            path.symlink_to(path.name)
        case "a pipe":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "cut short":
            path.write_bytes(content[: len(content) // 2])
        case "of other bytes":
            path.write_bytes(b"\x80\xff\x00{" * 50)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Model in both formats, prompts, and a reward function."""
    directory = tmp_path_factory.mktemp("inputs")
    shutil.copytree(LAPTOP / "base", directory / "base")
    for name in ("train.jsonl", "eval.jsonl"):
        lines = (LAPTOP / name).read_text().splitlines(keepends=True)
        (directory / name).write_text("".join(lines[:40]))
    import_hf(directory / "base", directory / "megatron")
    (directory / "reward.py").write_text("def f(completion, answer):\n    return 1.0\n")
    return directory


def check(directory: Path, *, megatron: bool) -> None:
    names = {"model.hf": "base", "data.train": "train.jsonl", "data.eval": "eval.jsonl"}
    overrides = [f"{key}={directory / name}" for key, name in names.items()]
    overrides += [f"reward.function={directory}/reward.py:f", f"run.dir={directory}/run"]
    overrides += [f"model.megatron={directory / 'megatron'}"] if megatron else []
    overrides += ["selection.num_candidates=32"]
    preflight.check(config.load(LAPTOP / "prepo.yaml", overrides))


@pytest.mark.parametrize("megatron", [False, True])
def test_what_is_complete_is_accepted(inputs, megatron):
    check(inputs, megatron=megatron)


@pytest.mark.parametrize(
    "how",
    [
        *("a directory", "a link to nowhere", "a link to itself", "a pipe"),
        *("empty", "cut short", "of other bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_it(inputs, tmp_path, how):
    for number, name in enumerate(FILES):
        directory = shutil.copytree(inputs, tmp_path / str(number))
        damage(directory / name, how)
        if how == "empty" and name == "reward.py":
            continue  # a module, without the function: `tests/unit/rewards/test_grading_pool.py`
        with pytest.raises(UserError) as error:
            check(directory, megatron="megatron" in name)
        words = str(error.value)
        named = (name, Path(name).name, str((directory / name).parent))
        assert "\n" not in words and any(part in words for part in named), (name, words)


def test_a_file_without_permission_is_named(inputs, monkeypatch):
    """Root may read everything, so the system call is replaced by one that refuses."""
    real = Path.open

    def refuse(path: Path, *arguments, **options):
        if path.name == "tokenizer.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read: Permission denied"):
        check(inputs, megatron=False)
