"""A path that does not exist is the first that a command reports: in one line, exit code 2."""

import sys

import pytest

from checkpoints_convert import __main__ as converter
from megatron_prepo import cli
from megatron_prepo.launch import __main__ as launch
from tests.e2e.laptop import LAPTOP
from tools.bench import checkpoint, head, perplexity, plan, utilisation
from tools.checks import gpu_check
from tools.data import prepare, prompt_perplexity
from tools.inspect import compare_logprobs, difficulty, step

CONFIG, BASE = str(LAPTOP / "prepo.yaml"), str(LAPTOP / "base")
COMMANDS = {
    # the shortest command line: what else it needs is not asked for
    cli: (
        "train ABSENT",
        "resume ABSENT",
        "resume --prove ABSENT",
        "replay ABSENT",
        "compare ABSENT",
        "evaluate --model ABSENT",
        "evaluate --model name=ABSENT",
        f"evaluate --model {BASE} --suite name=ABSENT",
        f"evaluate --model {BASE} --config ABSENT",
        "report ABSENT",
        f"report {BASE} ABSENT",
        "plan ABSENT",
        f"plan {CONFIG} --rates ABSENT",
        "doctor ABSENT",
    ),
    converter: (
        "import --hf ABSENT",
        "export --megatron ABSENT",
        f"export --megatron {BASE} --hf ABSENT",
        "verify --hf ABSENT",
        f"verify --hf {BASE} --megatron ABSENT",
        f"verify --hf {BASE} --prompts ABSENT",
        "inspect ABSENT",
    ),
    launch: ("ABSENT --executor slurm",),
    checkpoint: ("--model ABSENT", "--directory ABSENT"),
    head: ("--verl ABSENT",),
    perplexity: ("ABSENT",),
    plan: ("--model ABSENT",),
    utilisation: ("--model ABSENT",),
    compare_logprobs: ("ABSENT", "--hf ABSENT", "--prompts ABSENT"),
    gpu_check: ("--verl ABSENT", "--sglang ABSENT"),
    step: ("ABSENT",),
    prepare: ("--train gsm8k=ABSENT", "--suite gsm8k=ABSENT", "--perplexity ABSENT"),
    prompt_perplexity: ("ABSENT", "--hf ABSENT"),
    difficulty: ("--hf ABSENT", "--prompts ABSENT", "--completions ABSENT"),
}
SETTINGS = {
    # a later check has something to report as well: a layout that does not fit the model
    "train": ("model.hf", "model.megatron", "data.train", "data.eval", "reward.function"),
    "compare": ("model.hf", "model.megatron", "data.train", "data.eval", "reward.function"),
    "plan": ("model.hf",),
}
REST = {"compare": ["--methods", "prepo", "--seeds", "1"], "plan": ["--gpus", "3"]}


def the_line(capsys, absent) -> str:
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert not out and line.startswith("error: ") and str(absent) in line
    return line


@pytest.mark.parametrize(
    ("program", "words"),
    [(program, words) for program, lines in COMMANDS.items() for words in lines],
    ids=lambda value: value.replace(str(LAPTOP), "laptop") if isinstance(value, str) else "",
)
def test_an_absent_path_is_the_first_thing_that_is_said(
    program, words, tmp_path, monkeypatch, capsys
):
    absent = tmp_path / "absent"
    monkeypatch.setattr(sys, "argv", ["program", *words.replace("ABSENT", str(absent)).split()])
    assert program.main() == 2
    the_line(capsys, absent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "setting"),
    [(c, setting) for c, settings in SETTINGS.items() for setting in settings],
)
def test_an_absent_path_of_a_configuration_is_said_before_its_other_errors(
    command, setting, tmp_path, capsys
):
    absent = tmp_path / ("absent.py:f" if setting == "reward.function" else "absent")
    words = [command, CONFIG, *REST.get(command, ())]
    if command == "compare":
        words += ["--dir", str(tmp_path / "compare")]
    words += [f"{setting}={absent}", f"run.dir={tmp_path / 'run'}", "parallel.tensor=3"]
    assert cli.main(words) == 2
    assert f"no such file or folder: {setting}={absent}" in the_line(capsys, absent)


def test_all_absent_paths_of_a_configuration_are_named(tmp_path, capsys):
    names = ("model.hf", "data.eval")
    words = [f"{name}={tmp_path / name}" for name in names]
    assert cli.main(["train", CONFIG, *words]) == 2
    assert the_line(capsys, tmp_path).endswith(", ".join(words))


@pytest.mark.parametrize("setting", ["reward.function", "data.eval"])
def test_an_evaluation_names_an_absent_path_of_its_configuration(setting, tmp_path, capsys):
    absent = tmp_path / ("absent.py:f" if setting == "reward.function" else "absent")
    words = ["evaluate", "--model", BASE, "--config", CONFIG, "--out", str(tmp_path / "out")]
    assert cli.main([*words, f"{setting}={absent}"]) == 2
    the_line(capsys, absent)
    assert not (tmp_path / "out").exists()
