"""Every tool starts, and writes over no file that it did not write; new tools are tried as well."""

import importlib
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

from checkpoints_convert.__main__ import main as convert
from checkpoints_convert.verify import Report
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from tests.e2e.laptop import LAPTOP
from tools.checks import gpu_check, pack_sglang
from tools.data import prepare
from tools.inspect import compare_logprobs

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDERS = {
    "inspect.compare_logprobs",
    "data.prepare",
    "data.reasoning_gym_tasks",
    "checks.gpu_check",
    "checks.gpu_parts",
}
"""Tools whose `--out` is a folder."""
FURTHER = {"bench.train": ["--case", "laptop"]}
"""Required arguments of tools that look at the file after all arguments."""
MODULES = {
    f"{path.parent.name}.{path.stem}": path
    for path in sorted((REPOSITORY / "tools").glob("*/*.py"))
    if path.stem != "__init__"
}
COMMANDS = [name for name, path in MODULES.items() if "__main__" in path.read_text()]
TOOLS = sorted(
    name for name, path in MODULES.items() if '"--out"' in path.read_text() and name not in FOLDERS
)


@pytest.mark.parametrize("name", MODULES)
def test_a_tool_finds_what_it_imports_as_a_script(name):
    """Python puts a script's own folder on its path, not the repository."""
    text = MODULES[name].read_text()
    place = text.find("\nfrom tools")
    if place >= 0 and "__main__" in text:
        assert 0 <= text.find("sys.path.insert(0, ") < place


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_what_the_tool_does(capsys, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", [MODULES[name].name, "--help"])
    monkeypatch.setattr(sys, "path", [str(MODULES[name].parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(MODULES[name]), run_name="__main__")
    assert ended.value.code == 0
    summary = MODULES[name].read_text().partition('"""')[2].partition("\n")[0]
    shown = capsys.readouterr().out
    assert shown.startswith("usage:") and summary in " ".join(shown.split())


def test_no_tool_hides_a_library():
    """The folder of a script is the first place where its imports are looked for."""
    libraries = [path for name, path in MODULES.items() if importlib.util.find_spec(path.stem)]
    assert not libraries and not list((REPOSITORY / "tools").glob("[!_]*.py"))


def refused(capsys, monkeypatch, main, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
    capsys.readouterr()
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    return said


@pytest.mark.parametrize("name", TOOLS)
def test_a_file_of_the_users_is_refused_before_anything_is_measured(
    capsys, monkeypatch, tmp_path, name
):
    main = importlib.import_module(f"tools.{name}").main
    file = tmp_path / "result.json"
    for content in ("precious", "{}", '{"machine": {}, "cases": {}, "mine": 1}'):
        file.write_text(content)
        said = refused(capsys, monkeypatch, main, "--out", file, *FURTHER.get(name, ()))
        assert f"{file} exists" in said and file.read_text() == content
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("bench.head", ".md"),
        ("data.prompt_perplexity", ".json"),
        ("inspect.difficulty", ".png"),
    ],
)
def test_a_second_file_of_the_same_name_is_refused(capsys, monkeypatch, tmp_path, name, suffix):
    main = importlib.import_module(f"tools.{name}").main
    (tmp_path / f"result{suffix}").write_text("precious")
    said = refused(capsys, monkeypatch, main, "--out", tmp_path / "result.out")
    assert f"result{suffix} exists" in said


def test_a_link_is_refused_wherever_it_leads(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link exists"):
        ownership.earlier_result(tmp_path / "link", ("machine",))
    with pytest.raises(Exception, match="link exists"):
        ownership.new_file()(str(tmp_path / "link"))
    assert ownership.new_file()(str(tmp_path / "new")) == tmp_path / "new"


def test_an_earlier_result_is_known_by_its_keys(tmp_path):
    path = tmp_path / "result.json"
    assert ownership.earlier_result(path, ("machine", "cases")) is None
    path.write_text('{"cases": {"a": 1}, "machine": {}}')
    assert ownership.earlier_result(path, ("machine", "cases"))["cases"] == {"a": 1}
    for content in ("[]", "3", '{"cases": 1}', "[" * 99999, "\x00"):
        path.write_text(content)
        with pytest.raises(UserError, match="is not a result of this command"):
            ownership.earlier_result(path, ("machine", "cases"))


def test_a_manifest_is_replaced_and_no_other_file(capsys, monkeypatch, tmp_path):
    file = tmp_path / "manifest.json"
    file.write_text('{"mine": 1}')
    (tmp_path / "empty").mkdir()  # no model
    words = ["verify", "--hf", tmp_path / "empty", "--manifest", file]
    assert f"{file} exists" in refused(capsys, monkeypatch, convert, *words)
    file.write_text(Report().as_json())
    assert "exists" not in refused(capsys, monkeypatch, convert, *words)
    assert json.loads(file.read_text())["passed"]


@pytest.mark.parametrize("again", [[], ["--again", "head"]])
def test_a_users_file_in_the_folder_of_a_gpu_check_is_kept(capsys, monkeypatch, tmp_path, again):
    file = tmp_path / "head.json"
    for content in ("precious", '{"part": "mine"}'):
        file.write_text(content)
        said = refused(capsys, monkeypatch, gpu_check.main, "--rehearse", "--out", tmp_path, *again)
        assert f"{file} exists" in said and file.read_text() == content


@pytest.mark.parametrize("name", ["summary.md", "head.partial.json", "head.partial.md", "notes"])
def test_a_folder_of_the_users_gets_no_results_of_a_gpu_check(capsys, monkeypatch, tmp_path, name):
    (tmp_path / name).write_text("precious")
    words = ["--rehearse", "--parts", "head", "--budget", "1", "--out", tmp_path]
    said = refused(capsys, monkeypatch, gpu_check.main, *words)
    assert f"--out {tmp_path} exists, is not empty" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_folder_of_the_users_gets_no_logs_and_pictures(capsys, monkeypatch, tmp_path):
    for name in ("hf", "logs"):
        (tmp_path / name).mkdir()
    words = [str(LAPTOP / "prepo.yaml"), "--out", tmp_path]
    said = refused(capsys, monkeypatch, compare_logprobs.main, *words)
    assert f"--out {tmp_path} exists, is not empty" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "logs"]


def test_an_archive_of_the_users_is_refused_before_anything_is_downloaded(
    capsys, monkeypatch, tmp_path
):
    (tmp_path / "sglang_2.zip").write_text("precious")
    said = refused(capsys, monkeypatch, pack_sglang.main, tmp_path)
    assert "sglang_2.zip exists" in said
    assert (tmp_path / "sglang_2.zip").read_text() == "precious"


def test_prepared_data_replaces_what_it_wrote_and_nothing_else(capsys, monkeypatch, tmp_path):
    row = {"problem": "What is 1 + 1?", "answer": "2", "id": "0"}
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text(json.dumps(row) + "\n")

    def call(*words) -> int:
        return prepare.main([*map(str, words), "--out", str(out)])

    assert call("--suite", f"aime24={source}") == 0
    assert call("--suite", f"aime24={source}", "--together", "all") == 0
    assert call("--suite", f"aime24={source}") == 0
    (out / "suites" / "aime25.jsonl").write_text("precious")
    (out / "mine.jsonl").write_text("precious")
    (out / "perplexity.json").write_text("precious")
    for words in (
        ["--suite", f"aime25={source}"],
        ["--suite", f"aime24={source}", "--together", "mine"],
        ["--suite", f"aime24={source}", "--perplexity", LAPTOP / "base"],
    ):
        assert call(*words) == 2
        assert "exists, and is not in a statistics.json of this tool" in capsys.readouterr().err
    precious = [
        path for path in out.rglob("*") if path.is_file() and "precious" in path.read_text()
    ]
    assert len(precious) == 3
    # a call that fails on its way leaves its files to the next one
    assert call("--suite", f"aime24={source}", "--train", f"aime24={tmp_path}/absent") == 2
    assert call("--suite", f"aime24={source}") == 0
