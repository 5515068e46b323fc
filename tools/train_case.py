"""The same rollouts for every trainer: a model, prompts, completions and rewards in one file.

`tools/bench_train.py` writes a case, `tools/train_arms.py` reads it in each trainer's process.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from megatron_prepo.config import Config, load, to_yaml
from megatron_prepo.data import read_prompts
from megatron_prepo.files import atomic as durable
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.final_number import final_number
from megatron_prepo.rollout.engine import Request
from megatron_prepo.rollout.transformers_engine import EmbeddedEngine

REPOSITORY = Path(__file__).resolve().parent.parent
LAPTOP = REPOSITORY / "examples" / "laptop"

GRPO = (
    "parallel.tensor=1",
    "selection.method=random",
    "weighting.method=none",
    "loss.aggregation=token-mean",
    "advantage.eps=1e-4",
    "train.mini_batches=1",
    "train.total_steps=1000000",
    "optimizer.lr=1e-6",
    "eval.every=0",
    "eval.max_prompts=1",
    "eval.samples_per_prompt=1",
)
"""Ours, made equal to what TRL's GRPOTrainer does by default (`loss_type="dapo"`)."""


@dataclass(frozen=True)
class Group:
    """A prompt and its rollouts."""

    text: str
    answer: str
    prompt: list[int]
    completions: list[list[int]]
    rewards: list[float]


@dataclass(frozen=True)
class Case:
    """What the trainers are given; the settings of our configuration hold for all of them."""

    config: Config
    rows: int
    """Sequences in a micro-batch of the others; ours has a budget of tokens."""
    groups: list[Group]

    @property
    def tokens(self) -> int:
        """Of all prompts and completions, a prompt once for each of its rollouts."""
        return sum(len(g.prompt) + len(c) for g in self.groups for c in g.completions)

    @property
    def learnt_share(self) -> float:
        """Of these tokens, in groups with an advantage."""
        return self.learnt().tokens / self.tokens

    def learnt(self) -> "Case":
        """Only the groups with an advantage."""
        return replace(self, groups=[g for g in self.groups if len(set(g.rewards)) > 1])

    def rollouts(self, weight_version: int) -> list[Rollout]:
        """As our engine would hand them over, said to be made by these weights."""
        prompts = [
            Prompt(str(k), group.text, group.answer, tuple(group.prompt), (0, len(group.prompt)))
            for k, group in enumerate(self.groups)
        ]
        return [
            Rollout(prompt, tuple(c), (0.0,) * len(c), "", True, weight_version)
            for prompt, group in zip(prompts, self.groups, strict=True)
            for c in group.completions
        ]

    def write(self, directory: Path) -> None:
        """To a directory that `read` reads."""
        durable.write_text(directory / "config.yaml", to_yaml(self.config))
        tree = {"rows": self.rows, "groups": [asdict(group) for group in self.groups]}
        durable.write_text(directory / "case.json", json.dumps(tree))


def read(directory: str | Path, overrides: Sequence[str] = ()) -> Case:
    """The case that was written there, with some of our settings changed."""
    tree = json.loads(Path(directory, "case.json").read_text())
    config = load(Path(directory, "config.yaml"), overrides)
    return Case(config, tree["rows"], [Group(**group) for group in tree["groups"]])


def laptop(directory: Path, num_prompts: int, *, rows: int = 32) -> Case:
    """The demo's model, prompts and rewards; completions by our engine, before any training."""
    lines = (LAPTOP / "train.jsonl").read_text().splitlines(keepends=True)
    durable.write_text(directory / "train.jsonl", "".join(lines[:num_prompts]))
    config = read_config(
        f"run.dir={directory / 'run'}",
        f"data.train={directory / 'train.jsonl'}",
        f"selection.num_selected={num_prompts}",
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model.hf)
    prompts = read_prompts(config.data.train, tokenizer, max_tokens=config.data.max_prompt_tokens)
    engine = EmbeddedEngine(
        config.model.hf,
        tokenizer,
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch_size=256,
    )
    base = type(engine.model).from_pretrained(config.model.hf, dtype=engine.model.dtype)
    engine.load_weights([list(base.named_parameters())], version=0)
    size = config.rollout.samples_per_prompt
    request = Request(
        prompts=prompts,
        samples_per_prompt=size,
        temperature=1.0,
        max_new_tokens=config.rollout.max_new_tokens,
        seed="bench",
    )
    rollouts = engine.generate(request)
    rewards = [final_number(rollout.text, rollout.prompt.answer) for rollout in rollouts]
    groups = [
        Group(
            prompt.text,
            prompt.answer,
            list(prompt.tokens),
            [list(r.tokens) for r in rollouts[k * size : (k + 1) * size]],
            rewards[k * size : (k + 1) * size],
        )
        for k, prompt in enumerate(prompts)
    ]
    return Case(config, rows, groups)


def log_normal(
    directory: Path, num_prompts: int, *, rows: int = 8, hidden: int = 128, seed: int = 1
) -> Case:
    """A model with a larger vocabulary and random weights; lengths as unequal as in practice.

    Prompts have a median of 48 tokens (sigma 0.4), completions of 96 (sigma 0.8), cut at 512.
    Every group has rollouts of either reward, so that nothing can be left out.
    """
    model = directory / "model"
    torch.manual_seed(seed)
    shape = Qwen2Config(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(shape).save_pretrained(model)
    AutoTokenizer.from_pretrained(LAPTOP / "base").save_pretrained(model)
    config = read_config(
        f"run.dir={directory / 'run'}",
        f"model.hf={model}",
        "rollout.samples_per_prompt=4",
        "rollout.max_new_tokens=512",
        "data.max_prompt_tokens=512",
        f"selection.num_selected={num_prompts}",
    )
    draw = random.Random(seed)

    def text(median: int, sigma: float) -> list[int]:
        length = min(512, max(2, round(draw.lognormvariate(math.log(median), sigma))))
        return [draw.randrange(3, shape.vocab_size) for _ in range(length)]

    groups = [
        Group(str(k), "", text(48, 0.4), [text(96, 0.8) for _ in range(4)], [0.0, 1.0, 1.0, 0.0])
        for k in range(num_prompts)
    ]
    return Case(config, rows, groups)


def read_config(*overrides: str) -> Config:
    """The laptop's configuration as GRPO, with as many candidates as prompts are selected."""
    files = [f"data.eval={LAPTOP / 'eval.jsonl'}", f"model.hf={LAPTOP / 'base'}"]
    config = load(LAPTOP / "prepo.yaml", [*files, *GRPO, *overrides])
    selection = replace(config.selection, num_candidates=config.selection.num_selected)
    return replace(config, selection=selection)
