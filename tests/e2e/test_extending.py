"""The blocks of docs/extending.md: each is run as a reader would use it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from unittest import mock

import pytest
from ranks import join, on_ranks

from megatron_prepo import config as configuration
from megatron_prepo.config import RewardConfig
from megatron_prepo.rewards import load, pool
from tests.e2e.laptop import FILES, LAPTOP, REPOSITORY, metrics, summary
from tests.e2e.test_methods import TINY

PAGE, SELECTION = (
    (REPOSITORY / "docs" / page).read_text() for page in ("extending.md", "selection.md")
)


def block(containing: str, page: str = PAGE) -> str:
    """The block of Python on the page that has this text."""
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    [found] = [dedent(text) for text in blocks if containing in text]
    return found


def names_in(text: str) -> dict:
    names: dict = {}
    exec(text, names)
    return names


def files(name: str) -> list[Path]:
    """The files that the page means by a name."""
    places = (".", "megatron_prepo", "megatron_prepo/models", "tests/unit/selection")
    return [file for place in places if (file := REPOSITORY / place / name).is_file()]


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE)) - {"NAME.py"}
    assert {"rollout/build.py", "hf_config.py", "config/schema.py"} <= named
    for name in named - {"megatron_prepo/selection/NAME.py"}:
        assert files(name), name


def test_every_name_is_defined_in_the_file_that_the_page_gives():
    named = re.findall(r"((?:`[\w.]+`,?\s(?:or\s|and\s)?)+)in\s`([\w/]+\.py)`", PAGE)
    pairs = {(word, file) for words, file in named for word in re.findall(r"\w+(?=`)", words)}
    assert {("ARMS", "compare/arms.py"), ("TOP", "mapping.py")} <= pairs
    for word, name in pairs:
        [file] = files(name)
        defined = rf"^ *(class |def )?{word}\b *[:=(]"
        assert re.search(defined, file.read_text(), re.MULTILINE), f"{word} in {name}"


USES_LATEST = """
from megatron_prepo.compare.arms import ARMS
from megatron_prepo.config import SelectionConfig
from megatron_prepo.selection import load
from megatron_prepo.selection.user_class import TrialRun, try_out

config = SelectionConfig(method="latest", num_candidates=24, num_selected=8)
try_out(load("latest"), TrialRun(config, total_steps=20, seed=1, group_size=4))
print(load("latest").__module__, *ARMS["latest"])
"""


def test_a_method_is_built_in_by_the_page_s_steps(tmp_path):
    """The steps that concern the class in docs/selection.md, in a copy of the package."""
    package = tmp_path / "megatron_prepo"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "megatron_prepo", package, ignore=ignored)
    (package / "selection" / "latest.py").write_text(block("class LatestPassRate", SELECTION))
    replace_once(
        package / "selection" / "__init__.py",
        "METHODS: dict[str, type[Selector]] = {",
        "from megatron_prepo.selection.latest import LatestPassRate\n"
        'METHODS: dict[str, type[Selector]] = {"latest": LatestPassRate,',
    )
    replace_once(
        package / "config" / "schema.py", "SELECTION_METHODS = (", 'SELECTION_METHODS = ("latest", '
    )
    done = subprocess.run(
        [sys.executable, "-c", USES_LATEST],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [
        "megatron_prepo.selection.latest",
        "selection.method=latest",
        "weighting.method=none",
    ], done.stderr


def replace_once(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{old} in {file.name}"
    file.write_text(text.replace(old, new))


def test_the_page_s_reward_grades(tmp_path):
    (tmp_path / "reward.py").write_text(block("short_and_right"))
    name = f"{tmp_path}/reward.py:short_and_right"
    assert load(name)("18", "18") == 0.98
    pool.check(RewardConfig(function=name, low=-0.5))


def test_ministral_needs_two_lines_only(tmp_path, monkeypatch):
    from transformers import MinistralConfig, MinistralForCausalLM

    from megatron_prepo.actor import tiny_instance
    from megatron_prepo.models import hf_config
    from megatron_prepo.models.fit import check_fit
    from megatron_prepo.models.hf_files import HFTensors
    from tests.tiny_models import SHAPE

    config = MinistralConfig(
        **SHAPE,
        head_dim=8,
        sliding_window=4,
        layer_types=["full_attention"] * SHAPE["num_hidden_layers"],
        max_position_embeddings=256,
    )
    MinistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'ministral' is not one of"):
        tiny_instance.check(tmp_path)
    monkeypatch.setattr(hf_config, "FAMILIES", hf_config.FAMILIES)  # to be restored
    monkeypatch.setattr(hf_config, "EXEMPT", {*hf_config.EXEMPT})
    exec(block("ministral"), {})
    hf = hf_config.read_hf_config(tmp_path)
    with HFTensors(tmp_path, tied=False) as tensors:
        check_fit(tensors, hf)
    assert on_ranks(1, _ministral_agrees, tmp_path) == [True]


def _ministral_agrees(directory: Path) -> bool:
    """In a process that has no job yet."""
    from megatron_prepo.actor import tiny_instance

    exec(block("ministral"), {})
    return tiny_instance.check(directory).passed


def test_the_page_s_engine_and_loss_train(tmp_path):
    on_ranks(1, _train, str(tmp_path / "run"))
    assert summary(tmp_path / "run")["steps"] == 3
    for step in metrics(tmp_path / "run"):
        assert step["reward/mean"] == 0.5 and step["loss/grad_norm"] > 0


def _train(directory: str) -> None:
    from megatron_prepo.actor import actor, parallel
    from megatron_prepo.train import train
    from megatron_prepo.trainer import setup

    engine = names_in(block("class AnswerKey"))["AnswerKey"]
    loss = names_in(block("def policy_loss"))["policy_loss"]
    join(1)
    overrides = [*FILES, *TINY, f"run.dir={directory}", "weight_sync.verify=never"]
    with (
        mock.patch.object(setup, "build_engine", lambda config, tokenizer, **_: engine(tokenizer)),
        mock.patch.object(actor, "policy_loss", loss),
    ):
        train(configuration.load(LAPTOP / "prepo.yaml", overrides))
    parallel.shut_down()
