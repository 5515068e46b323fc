"""The commands of `docs/quickstart_gpu.md`, as far as they go without a GPU, a hub and an index."""

import json
import re
import shlex

import pytest

from megatron_prepo.cli import main
from tests.e2e.laptop import REPOSITORY

PAGE = (REPOSITORY / "docs" / "quickstart_gpu.md").read_text()
BLOCK = re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].replace("\\\n", " ")
COMMANDS = dict(
    (int(number), line.split(" # ")[0].strip())
    for line in BLOCK.splitlines()
    for number in re.findall(r"# (\d+)", line)
)
OURS = {number: text for number, text in COMMANDS.items() if text.startswith("megatron-prepo")}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def test_there_are_twelve():
    assert list(COMMANDS) == list(range(1, 13))
    assert sorted(OURS) == [5, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("number", [8, 10, 11])
def test_a_command_is_not_refused(number, capsys):
    """A dry run reports missing weights and prompts; plan and dry run have the same servers."""
    marked = re.search(rf"# {number} \[--dry-run\]", BLOCK)
    words = shlex.split(OURS[number])[1:] + (["--dry-run"] if marked else [])
    assert (marked is None) == (number == 8)
    assert main(words) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "(sglang): 8 of 1 GPU each" in said if number == 8 else "8 SGLang servers" in said


def test_files_of_other_commands_are_there():
    for name in re.findall(r"(?:locks|tools)/\S+", " ".join(COMMANDS.values())):
        assert (REPOSITORY / name).is_file(), name
    assert "examples/paper/qwen2.5-7b/model" in COMMANDS[6]


def test_the_predictions_are_those_of_plan(capsys):
    words = shlex.split(OURS[8])[1:]
    assert main([*words, "--json", "--eval-prompts", "1200"]) == 0
    answer = json.loads(capsys.readouterr().out)
    step = [sum(both[i] for both in answer["seconds"].values()) for i in (0, 1)]
    assert [round(seconds, -1) for seconds in step] == [450, 1000]
    assert [round(hours, -1) for hours in answer["gpu_hours"]] == [350, 780]
    assert [round(hours, -1) for hours in answer["evaluation_hours"]] == [160, 420]
    days = [
        (train + evaluation) / 8 / 24
        for train, evaluation in zip(answer["gpu_hours"], answer["evaluation_hours"])
    ]
    assert f"{days[0]:.1f} to {days[1]:.1f} days" in PAGE
