"""The tool that compares engine, actor and `transformers`: its table, its verdict, its picture."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_prepo.config import ParallelConfig
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rollout.weight_sync import TOLERANCE
from tests.e2e.laptop import FILES, LAPTOP, REPOSITORY
from tools.inspect import compare_logprobs
from tools.inspect.compare_logprobs import Comparison

WORDS = SimpleNamespace(decode=lambda tokens: " ".join(f"t{token}" for token in tokens))


def test_the_worst_token_comes_first_with_what_stands_before_it():
    prompt = Prompt("p", "", "", (5, 6), (0, 2))
    rollouts = [
        Rollout(prompt, (7, 8), (-1.0, -2.0), "", True, 0),
        Rollout(prompt, (9,), (-3.0,), "", True, 0),
    ]
    actor_N = [torch.tensor([-1.25, -1.0]), torch.tensor([-3.0])]
    engine_N = [torch.tensor(rollout.engine_logprobs) for rollout in rollouts]
    comparison = Comparison(
        rollouts, {"engine": engine_N, "actor": actor_N, "transformers": actor_N}
    )
    lines = compare_logprobs.text(comparison, WORDS).splitlines()
    rows = {line.split("  ")[0]: line.split()[-4:] for line in lines[1:4]}
    assert rows["engine - actor"][:3] == ["0.42", "1", "1"]
    assert rows["actor - transformers"] == ["0"] * 4
    worst, second, third = lines[6:]
    assert worst.split()[:4] == ["-2.00000", "-1.00000", "-1.00000", "-1"]
    assert worst.endswith("'t8' after 't5 t6 t7' (p, token 1)")
    assert second.split()[3] == "0.25" and second.endswith("'t7' after 't5 t6' (p, token 0)")
    assert third.split()[3] == "0"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Enter a directory with a configuration, a model and prompts, all empty."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.yaml", "d", "p"):
        (tmp_path / name).touch()


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    "arguments", [[], ["--hf", "d", "--url", "u"], ["a.yaml", "--hf", "d"], ["x=1"]]
)
def test_what_is_to_be_compared_has_to_be_said_in_one_of_two_ways(arguments, capsys):
    with pytest.raises(SystemExit):
        compare_logprobs.parse([*arguments, "--out", "o"])
    assert "give a configuration, or all of --hf, --url and --prompts" in capsys.readouterr().err


@pytest.mark.usefixtures("files")
def test_a_directory_and_a_server_make_a_configuration():
    options = compare_logprobs.parse(
        ["model.dtype=float32", "--hf", "d", "--url", "http://a:1", "--prompts", "p", "--out", "o"]
    )
    config = compare_logprobs.config_of(options)
    assert (config.model.hf, config.servers.urls) == ("d", ("http://a:1",))
    assert (config.rollout.engine, config.data.train, config.run.dir) == ("sglang", "p", "o/run")
    assert config.model.dtype == "float32"


def test_one_process_gets_a_layout_of_one_rank_whatever_the_configuration_says(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"]
    layout += ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.data=2"]
    config = str(LAPTOP / "prepo.yaml")
    options = compare_logprobs.parse([config, *layout, "parallel.expert=2", "--out", "o"])
    assert compare_logprobs.config_of(options).parallel == ParallelConfig(data=1)


def test_the_embedded_engine_agrees_and_an_impossible_tolerance_says_no(tmp_path):
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "inspect" / "compare_logprobs.py"),
        str(LAPTOP / "prepo.yaml"),
        *FILES,
        "--num-prompts=2",
        "--tolerance=1e-12",
        f"--out={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "engine and actor DIFFER" in done.stdout
    mean = done.stdout.splitlines()[1].split()[3]
    assert 0 < float(mean) < TOLERANCE["float32"], "what would pass"
    assert (tmp_path / "compare_logprobs.png").stat().st_size > 5_000
