"""Every file that a rank will read is opened before one is started."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_models

from checkpoints_convert.convert import import_hf
from megatron_prepo import config
from megatron_prepo.errors import UserError
from megatron_prepo.inputs import preflight, prompt_digests
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.records import Prompt
from megatron_prepo.run import opening

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


def test_sglang_does_not_go_beyond_a_sliding_window(tmp_path):
    """Its Mistral has none: tokens would attend to more than the actor's; within it all agree."""
    hf = read_hf_config(tiny_models.save(tiny_models.mistral(window=8), tmp_path))
    prompts = [Prompt("short", "", "", (3, 4), (0, 2)), Prompt("long", "", "", (3, 4, 5), (0, 3))]
    fits, longer = (config.RolloutConfig(max_new_tokens=n, engine="sglang") for n in (5, 6))
    preflight.check_room(fits, hf, prompts)
    with pytest.raises(
        UserError, match=r"prompt 'long' .*_tokens=6 .* 8 tokens in sliding_window, "
    ):
        preflight.check_room(longer, hf, prompts)
    preflight.check_room(config.RolloutConfig(max_new_tokens=6), hf, prompts)
    preflight.check_room(longer, hf | {"sliding_window": None}, prompts)


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


def test_dropped_prompts_are_counted_and_recorded(inputs, tmp_path):
    """In both files; a resumed run drops the same, since settings and digests must be the same."""
    names = {"model.hf": "base", "data.train": "train.jsonl", "data.eval": "eval.jsonl"}
    overrides = [f"{key}={inputs / name}" for key, name in names.items()]
    overrides += [f"run.dir={tmp_path}", "selection.num_candidates=2", "selection.num_selected=2"]
    long = config.load(LAPTOP / "prepo.yaml", overrides)
    everything = preflight.check(long)
    assert everything.dropped == {}
    lengths = sorted(len(prompt.tokens) for prompt in everything.train_prompts)
    limit = lengths[len(lengths) // 2]
    short = [*overrides, f"data.max_prompt_tokens={limit}"]
    with pytest.raises(UserError, match=r"data\.overlong_prompts=drop"):
        preflight.check(config.load(LAPTOP / "prepo.yaml", short))
    short = config.load(LAPTOP / "prepo.yaml", [*short, "data.overlong_prompts=drop"])
    found = preflight.check(short)
    kept = [p.id for p in everything.train_prompts if len(p.tokens) <= limit]
    assert [p.id for p in found.train_prompts] == kept
    assert found.dropped["data.train"] == len(lengths) - len(kept) > 0
    prompt_digests.save(tmp_path, found.digests)
    assert json.loads((tmp_path / "prompts.json").read_text())["dropped"] == found.dropped
    assert preflight.check(short).digests == found.digests
    shown = opening.prompts(short.data, found.train_prompts, found.eval_sets, found.dropped)
    assert f"{found.dropped['data.train']} of data.train" in shown.splitlines()[1]
