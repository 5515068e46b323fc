"""docs/from_verl.md and docs/from_slime.md: their files are written and their commands executed.

The hub is a stand-in, which serves the demo's tiny model under the names of the pages.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from checkpoints_convert import __main__ as converter
from megatron_prepo import cli, rewards
from megatron_prepo import config as configuration
from tests.e2e.laptop import LAPTOP, REPOSITORY, SHORT, summary
from tests.fake_hub import folder, serving

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-4B")
CONFIGS = {"from_verl": "gsm8k.yaml", "from_slime": "dapo.yaml"}
REWARDS = {"from_verl": "my_reward.py", "from_slime": "my_rm.py"}
USERS_OWN = {
    "my_score.py": "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
    "    return float(solution_str == ground_truth and data_source == extra_info['source'])\n",
    "my_rules.py": "def judge(text, label, metadata):\n"
    "    return float(text == label) * metadata['x']\n",
}
TINY = [
    *SHORT,
    "parallel.tensor=1",
    "parallel.sequence=false",
    "model.dtype=float32",
    "rollout.engine=embedded",
    "rollout.max_new_tokens=52",
    "data.max_prompt_tokens=96",
    "eval.every=0",
    "eval.samples_during=1",
]
"""A size for the demo's model and a machine without a GPU."""


def page(name):
    return (REPOSITORY / "docs" / f"{name}.md").read_text()


def fenced(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.DOTALL | re.MULTILINE)


def commands(name):
    """Return the page's commands of ours, without those of the peer."""
    lines = re.sub(r"\\\n *", "", page(name)).splitlines()
    starts = ("    megatron-prepo ", "    python -m checkpoints_convert ")
    return [shlex.split(line) for line in lines if line.startswith(starts)]


def laptop_rows(file):
    return [json.loads(line) for line in (LAPTOP / file).read_text().splitlines()]


def verl_row(row):
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": {"split": "train", "source": "openai/gsm8k"},
    }


def slime_row(row):
    turns = [{"role": "user", "content": row["prompt"]}]
    return {"prompt": turns, "label": row["answer"], "metadata": {"x": 1}}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Work in the folder of somebody who has the files of both pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    for split, file in (("train", "train.jsonl"), ("test", "eval.jsonl")):
        table = pyarrow.Table.from_pylist([verl_row(row) for row in laptop_rows(file)])
        parquet.write_table(table, tmp_path / "data" / "gsm8k" / f"{split}.parquet")
    for name in CONFIGS:
        (tmp_path / CONFIGS[name]).write_text(fenced(name, "yaml")[0])
        (tmp_path / REWARDS[name]).write_text(fenced(name, "python")[0])
    for name, text in USERS_OWN.items():
        (tmp_path / name).write_text(text)
    with serving(monkeypatch, tmp_path / "cache") as hub:
        for model in MODELS:
            hub.commit("model", model, folder(LAPTOP / "base", **{"chat_template.jinja": TEMPLATE}))
        for repo, file in (("dapo-math-17k", "train.jsonl"), ("aime-2024", "eval.jsonl")):
            lines = [json.dumps(slime_row(row)) for row in laptop_rows(file)]
            files = {f"{repo}.jsonl": "\n".join(lines).encode()}
            hub.commit("dataset", f"zhuzilin/{repo}", files)
        yield hub


def run(words, monkeypatch):
    """Run a command as typed on the page; return its exit code."""
    if words[0] == "megatron-prepo":
        return cli.main(words[1:])
    monkeypatch.setattr(sys, "argv", words[2:])
    return converter.main()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pages_configuration_finds_its_model_and_rows(name, reader, capsys):
    """What is missing on a machine for tests are GPUs, SGLang, and other words than the demo's."""
    assert [words[-1] for words in commands(name)][:1] == ["--dry-run"]
    assert cli.main(commands(name)[0][1:]) == 0
    shown = capsys.readouterr().out
    assert "nothing was started (--dry-run)" in shown
    for row in ("hub", "data.train", "data.eval", "model ", "tokenizer", "weights", "reward"):
        assert not re.search(rf"^{re.escape(row)}\S* +missing", shown, re.MULTILINE), shown


def test_the_rewards_of_the_pages_are_called_with_rows(reader):
    own = {"prompt": "1+1", "answer": "2"}
    verl = rewards.load("my_reward.py:reward")
    assert [verl(text, "2", record=verl_row(own)) for text in ("2", "3")] == [1.0, 0.0]
    slime = rewards.load("my_rm.py:reward")
    assert slime("2", "2", record=slime_row(own), finished=True) == 1.0
    assert slime("2", "2", record=slime_row(own), finished=False) == 0.0


def test_settings_in_the_tables_exist():
    """Names such as `loss.clip_low` of the second column; short ones follow a full one."""
    known = set(configuration.loading._known_keys())
    sections = {key for key in known if "." not in key} - {"sglang", "megatron"}
    for name in CONFIGS:
        found = set()
        for cell in re.findall(r"^\|[^|]*\|([^|]*)\|", page(name), re.MULTILINE):
            section = None
            for word in re.findall(r"`(\w+(?:\.\w+)?)(?:=[^`]*)?`", cell):
                first, dot, _ = word.partition(".")
                section = first if dot and first in sections else section
                found |= {f"{section}.{word}"} if section and not dot else {word} if dot else set()
        ours = {key for key in found if key.partition(".")[0] in sections}
        assert len(ours) > 45 and ours <= known, (name, len(ours), sorted(ours - known))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_all_commands_of_a_page_work_in_its_order(name, reader, monkeypatch, capsys):
    for words in commands(name):
        trains = words[1] == "train" and words[-1] != "--dry-run"
        assert run([*words, *(TINY if trains else [])], monkeypatch) == 0, capsys.readouterr()
    directory = Path(configuration.load(CONFIGS[name]).run.dir)
    assert summary(directory)["steps"] == 2
    saved = configuration.load(directory / "config.yaml")
    assert re.fullmatch(r"hf://Qwen/[\w.-]+@[0-9a-f]{40}", saved.model.hf)
    if name == "from_verl":
        assert "model.safetensors" in reader.uploads["me/gsm8k-grpo"]
