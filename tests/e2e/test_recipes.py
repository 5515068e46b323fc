"""Every recipe of `examples`, from its configuration to two steps of a run on this machine.

What it needs of GPUs is computed; what it submits is in `test_launch.py`.  A run has the recipe's
settings except for sizes: a tiny model of the same family, two ranks, a few prompts.  The servers
are fakes, half of whose completions are the answer.
"""

import json
import os
import sys
from pathlib import Path

import fake_sglang_package
import pandas
import pytest
import tiny_models
from ranks import join, on_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_prepo import config as configuration
from megatron_prepo.config import Config
from megatron_prepo.launch import recipes
from megatron_prepo.plan import planner as plan
from megatron_prepo.rollout.placement import Placement, place
from tests.e2e.laptop import REPOSITORY, metrics, summary

RECIPES = sorted(recipes.recipes())
GPUS = {
    "qwen2.5-32b": (32, 0),
    "qwen3-30b-a3b": (32, 0),
    "qwen2.5-72b": (64, 32),
    "llama-3.1-70b": (64, 32),
    "qwen3-235b-a22b": (256, 64),
}
"""GPUs that train, and further ones that only generate; of all others 8 and 0."""
MODELS = {
    "qwen2": lambda: tiny_models.qwen2(tied=False),
    "qwen3": lambda: tiny_models.qwen3(tied=False),
    "llama": lambda: tiny_models.llama3(),
    "mistral": lambda: tiny_models.mistral(),
    "qwen3_moe": lambda: tiny_models.qwen3_moe(),
}
QUICK = {"qwen2.5-7b/prepo", "llama-3.1-8b/greso", "qwen3-30b-a3b/prepo", "qwen2.5-72b/prepo"}
"""Recipes that run by default: each transport, and each family but Qwen3's dense one and
Mistral."""
ANSWER = "so \\boxed{7}"
SIZES = [
    "model.layers=torch",
    "data.max_prompt_tokens=64",
    "selection.num_candidates=20",
    "selection.num_selected=4",
    "rollout.max_new_tokens=16",
    "train.micro_batch_tokens=160",
    "train.total_steps=2",
    "servers.tensor=1",
    "servers.nodes=0",
    f"servers.python={sys.executable}",
    "weight_sync.verify=never",  # the fake's probabilities are no model's
    "weight_sync.request_seconds=60",
    "eval.samples_per_prompt=2",
]


def load(name: str, *overrides: str) -> Config:
    return configuration.load(recipes.find(name), overrides)


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Run in the directory in which the headers of the recipes run commands."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_everything_that_a_run_needs(name):
    config, path = load(name), recipes.find(name)
    model, method = name.split("/")
    train, generate = GPUS.get(model, (8, 0))
    where = place(config)
    assert (where.ranks, where.server_nodes * 8) == (train, generate)
    assert where.gpus == train + generate and where.started_by != "ranks"
    assert where.shared == config.servers.release_memory == (not generate)
    assert config.reward.function == "math"
    assert config.eval.every and config.checkpoint.every and config.checkpoint.keep_last
    header = path.read_text().split("run:", 1)[0].replace("\\\n#    ", "")
    recipe = model if method == "prepo" else name
    launch = f"python -m megatron_prepo.launch {recipe} --executor slurm --account A"
    assert " ".join(launch.split()) in " ".join(header.split())
    assert f"{train} H100 with 80 GB" in header
    assert not generate or f"{generate} generate" in header
    assert ("megatron-prepo train " + str(path.relative_to(REPOSITORY)) in header) == (train == 8)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("/prepo")])
def test_the_engines_share_of_the_memory_fits_with_the_actor(name):
    """Compute by hand, for H100s: SGLang gives its cache back while the actor learns."""
    config = load(name)
    where, fraction = place(config), config.sglang["mem_fraction_static"]
    found = memory(config, where)
    static = fraction * found.memory
    weights = 2 * found.parameters / where.tensor
    assert (static - weights) / cache_bytes(config, where) >= 10, "longest sequences per engine"
    if not where.shared:
        assert static + found.reserve <= found.memory
        return
    for rank in found.ranks:
        assert rank.actor + static + found.reserve <= found.memory
        learning = rank.actor + weights + rank.activations + rank.head
        assert learning + found.reserve <= found.memory


def memory(config: Config, where: Placement) -> plan.Plan:
    engine = "sglang" if where.shared else "elsewhere"
    tensor = where.tensor if where.shared else None
    return plan.make_plan(
        config, plan.PlanRequest(where.ranks, engine=engine, engine_tensor=tensor)
    )


def cache_bytes(config: Config, where: Placement) -> float:
    """Return the bytes on each GPU of an engine of the keys and values of a longest sequence."""
    hf = json.loads(Path(config.model.hf, "config.json").read_text())
    heads = hf["num_attention_heads"]
    width = hf.get("head_dim") or hf["hidden_size"] // heads
    groups = max(1, hf["num_key_value_heads"] / where.tensor)
    tokens = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    return tokens * hf["num_hidden_layers"] * groups * width * 2 * 2


def layout(config: Config) -> list[str]:
    """Return the settings of two ranks with the recipe's kinds of parallelism, one at a time."""
    parallel, experts = config.parallel, config.parallel.expert > 1
    if parallel.pipeline > 1 and not experts:
        sizes = {"tensor": 1, "pipeline": 2, "data": 1, "sequence": "false"}
    elif parallel.tensor > 1:
        sizes = {"tensor": 2, "pipeline": 1, "data": 1, "expert": 2 if experts else 1}
    else:
        sizes = {"data": 2}
    return [f"parallel.{name}={size}" for name, size in sizes.items()]


def family(config: Config) -> str:
    return json.loads(Path(config.model.hf, "config.json").read_text())["model_type"]


def save_model(directory: Path, kind: str) -> None:
    """Write a tiny model with a tokenizer of single bytes and a chat template."""
    tiny_models.save(MODELS[kind](), directory)
    special = ["<pad>", "<bos>", "<eos>"]  # the end is number 2, as the fake's
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    saved.chat_template = "{% for turn in messages %}user: {{ turn.content }}{% endfor %}"
    saved.save_pretrained(directory)


def run_all(runs: dict[str, list[str]], environment: dict[str, str]) -> None:
    """Make the runs of recipes, one after the other, by name."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.train import train

    os.environ.update(environment)
    for name, overrides in runs.items():
        join(2)
        train(load(name, *overrides))
        parallel.shut_down()


@pytest.fixture(scope="module")
def run_recipes(tmp_path_factory):
    """Return a function that makes runs in one pair of ranks; their directories by name."""

    def make(names: list[str]) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("recipes")
        prompts = [{"id": str(i), "prompt": f"What is {i}?", "answer": "7"} for i in range(20)]
        (root / "train.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
        (root / "eval.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts[:2]))
        runs = {}
        for name in names:
            config = load(name)
            hf = root / family(config)
            if not hf.exists():
                save_model(hf, hf.name)
            files = [f"model.hf={hf}", *(f"data.{f}={root}/{f}.jsonl" for f in ("train", "eval"))]
            budget = ["train.rollout_budget=512"] if config.train.rollout_budget else []
            where = [f"run.dir={root / name}", *files, *SIZES, *layout(config), *budget]
            runs[name] = where
        tokens = PreTrainedTokenizerFast.from_pretrained(hf)(ANSWER).input_ids
        environment = fake_sglang_package.environment(root / "package")
        on_ranks(2, run_all, runs, environment | {"FAKE_ANSWER": json.dumps(tokens)})
        return {name: root / name for name in names}

    return make


def test_recipes_of_each_family_and_transport_train(run_recipes):
    check(run_recipes(sorted(QUICK)))


@pytest.mark.slow
def test_all_other_recipes_train(run_recipes):
    check(run_recipes(sorted(set(RECIPES) - QUICK)))


def check(directories: dict[str, Path]) -> None:
    for name, directory in directories.items():
        ledger = pandas.read_json(directory / "ledger.jsonl", lines=True)
        assert len(ledger) == summary(directory)["rollouts"] >= 2 * 4 * 8, name
        for step in metrics(directory):
            assert step["loss/grad_norm"] > 0 and 0 < step["reward/mean"] < 1, name
        assert (directory / "checkpoints" / "iter_0000002" / "run.json").is_file(), name
        kept = configuration.load(directory / "config.yaml")
        assert kept.rollout.engine == "sglang" and kept.sglang == load(name).sglang
