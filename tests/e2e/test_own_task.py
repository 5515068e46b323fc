"""docs/own_task.md from top to bottom: its files are written and its commands executed in order."""

import re
import shlex
import subprocess

import pytest

from megatron_prepo.cli import main
from tests.e2e.laptop import REPOSITORY, metrics, summary

PAGE = (REPOSITORY / "docs" / "own_task.md").read_text()
FILES = {"json": "prompts.jsonl", "python": "reward.py", "yaml": "task.yaml"}


def fenced(language: str) -> list[str]:
    """Return the page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Return the page's commands: indented lines, with their continuations."""
    lines = re.sub(r"\\\n *", "", PAGE).splitlines()
    starts = ("    megatron-prepo ", "    mkdir ")
    return [shlex.split(line) for line in lines if line.startswith(starts)]


def test_its_size_is_as_it_says():
    prompts, reward, settings = (fenced(language)[0] for language in FILES)
    assert len(prompts.splitlines()) == 10
    assert len(reward.splitlines()) == 8 and len(settings.splitlines()) == 8


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The directory in which a reader would have executed the page's commands, and the output."""
    root, output = tmp_path_factory.mktemp("clone"), []
    (root / "examples").symlink_to(REPOSITORY / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in commands():
            if command[0] == "mkdir":
                subprocess.run(command, check=True)
                for language, name in FILES.items():
                    (root / "my_task" / name).write_text(fenced(language)[0])
            else:
                assert main(command[1:]) == 0, command
            output.append(command[:2])
    assert output == [
        ["mkdir", "-p"],
        ["megatron-prepo", "train"],
        ["megatron-prepo", "report"],
        ["megatron-prepo", "evaluate"],
    ]
    return root


def test_it_learns(done):
    """On the page: 0.675 before, 0.950 after."""
    result = summary(done / "my_task" / "run")
    assert result["pass_rate_before"] < 0.85 < result["pass_rate_after"]
    assert result["gain_ci95"][0] > 0
    assert len(metrics(done / "my_task" / "run")) == 30


def test_the_report_and_the_evaluation_are_there(done):
    text = (done / "my_task" / "report.html").read_text()
    assert "Held-out pass rate" in text and "Gradient norm" in text
    table = (done / "my_task" / "evaluation" / "table.md").read_text()
    assert "base" in table and "trained" in table


def test_the_model_answers_in_transformers(done, monkeypatch, capsys):
    monkeypatch.chdir(done)
    exec(fenced("python")[1], {})
    assert "= " in capsys.readouterr().out.split("answer :")[1]
