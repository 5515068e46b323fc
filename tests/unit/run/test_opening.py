"""The first and the last words of a run."""

from pathlib import Path

import pytest

from megatron_prepo import config as configuration
from megatron_prepo.config import LoraConfig, ParallelConfig
from megatron_prepo.run import opening

LAPTOP = Path(__file__).resolve().parents[3] / "examples" / "laptop" / "prepo.yaml"


def rows(*overrides: str, launched: bool = True) -> dict[str, str]:
    config = configuration.load(LAPTOP, overrides)
    text = opening.text(config, num_ranks=config.parallel.num_ranks, launched=launched)
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_a_run_names_its_directory_ranks_engine_and_checkpoints():
    found = rows()
    assert found["run"] == "runs/laptop"
    assert found["ranks"] == "2: tensor 2; output of all but rank 0: runs/laptop/logs/rank_N.log"
    assert found["engine"] == "transformers, in the ranks"
    assert found["steps"] == "80 of 32 prompts, by prepo out of 160, x 8 rollouts"
    assert rows(launched=False)["ranks"] == "2: tensor 2"
    assert rows("checkpoint.every=5")["checkpoints"] == "every 5 steps, and at the end"
    assert rows("checkpoint.every=0")["checkpoints"] == "at the end only"
    assert rows("checkpoint.every=")["checkpoints"].startswith("after the first step, then when")
    weights_only = ("checkpoint.every=", "checkpoint.optimizer=false")
    assert rows(*weights_only)["checkpoints"] == "at the end only"


def test_servers_and_custom_rewards_name_their_logs():
    found = rows("rollout.engine=sglang", "servers.count=2", "reward.function=mine.py:f")
    assert found["engine"].startswith("2 SGLang servers of tensor 1")
    assert found["engine"].endswith("runs/laptop/logs/sglang_N.log")
    assert found["reward"] == "mine.py:f; what it prints: runs/laptop/logs/reward.log"
    given = rows("rollout.engine=sglang", "servers.urls=[http://10.0.0.7:30000]")
    assert given["engine"] == "SGLang servers that run already: http://10.0.0.7:30000"


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "words"),
    [
        ({}, 1, "one GPU or CPU"),
        ({"tensor": 4, "pipeline": 2}, 16, "tensor 4 x pipeline 2 x data 2"),
        ({"context": 2, "expert": 2}, 2, "context 2, expert 2"),
    ],
)
def test_a_layout_in_words(sizes, num_ranks, words):
    assert opening.layout(ParallelConfig(**sizes), num_ranks) == words


def test_an_interrupted_and_a_finished_run_name_the_next_command():
    assert opening.to_resume(Path("runs/a"), [5, 10]).startswith("runs/a has a checkpoint of 10")
    assert "no checkpoint yet" in opening.to_resume(Path("runs/a"), [])
    config = configuration.load(LAPTOP)
    words = opening.next_steps(config.run.dir, config.lora)
    assert "megatron-prepo evaluate --model runs/laptop --out runs/laptop-evaluation" in words
    assert "runs/laptop/hf, in Hugging Face format" in words and "adapter" not in words
    words = opening.next_steps(config.run.dir, LoraConfig(rank=2))
    assert "runs/laptop/adapter, for peft" in words


def test_servers_of_a_run_on_two_machines_are_those_of_this_one(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    config = configuration.load(LAPTOP, ["rollout.engine=sglang"])
    assert "2 SGLang servers" in opening.text(config, num_ranks=4, launched=False)
    assert "4 SGLang servers" in opening.text(config, num_ranks=4, launched=True)
