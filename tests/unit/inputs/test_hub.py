"""Models and data sets on the hub: names, revisions, uploads, against a local stand-in."""

import json
import shlex
import subprocess
import sys

import pytest

from checkpoints_convert import __main__ as converter
from megatron_prepo import cli
from megatron_prepo import config as configuration
from megatron_prepo.compare import record, runner
from megatron_prepo.compare.arms import parse_arms
from megatron_prepo.config import to_tree
from megatron_prepo.errors import UserError
from megatron_prepo.files import rows
from megatron_prepo.inputs import hub as hub_names
from megatron_prepo.inputs import preflight
from megatron_prepo.run import directory as run_directory
from tests.e2e.laptop import LAPTOP
from tests.fake_hub import folder, serving
from tools.bench import perplexity
from tools.inspect import compare_logprobs

MODEL, DATA = "Qwen/Qwen2.5-0.5B", "openai/gsm8k"
FILES = {
    f"main/{split}-00000-of-00001.jsonl": (LAPTOP / file).read_bytes()
    for split, file in (("train", "train.jsonl"), ("test", "eval.jsonl"))
}
PLACES = [
    f"model.hf={MODEL}",
    f"data.train=hf://datasets/{DATA}/main/train-*.jsonl",
    f"data.eval=hf://datasets/{DATA}/main/test-*.jsonl",
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with serving(monkeypatch, tmp_path / "cache") as served:
        served.model = served.commit("model", MODEL, folder(LAPTOP / "base", **{"x.bin": "old"}))
        served.data = served.commit("dataset", DATA, FILES | {"README.md": b"card"})
        yield served


def load(tmp_path, *overrides):
    settings = [f"run.dir={tmp_path / 'run'}", *PLACES, "parallel.tensor=1", *overrides]
    return configuration.load(LAPTOP / "prepo.yaml", settings)


def test_a_name_is_a_folder_of_one_commit(hub, tmp_path):
    config = hub_names.resolved(load(tmp_path))
    assert config.model.hf == str(
        tmp_path / "cache" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / hub.model
    )
    inputs = preflight.check(config)
    assert len(inputs.train_prompts) == len((LAPTOP / "train.jsonl").read_bytes().splitlines())
    assert not any("x.bin" in request for request in hub.requests), "weights nobody reads"
    saved = run_directory.with_absolute_paths(config)
    assert saved.model.hf == f"hf://{MODEL}@{hub.model}"
    assert saved.data.train == f"hf://datasets/{DATA}@{hub.data}/main/train-*.jsonl"
    assert saved.data.eval == f"hf://datasets/{DATA}@{hub.data}/main/test-*.jsonl"
    compared = record.settings(saved)
    assert compared["model.hf"] == saved.model.hf and compared["data.eval"] == saved.data.eval
    assert to_tree(hub_names.resolved(saved)) == to_tree(config) | {"run": to_tree(saved)["run"]}


def test_exported_adapters_name_their_base_wherever_they_are_read(hub, tmp_path, monkeypatch):
    config = hub_names.resolved(load(tmp_path))
    assert hub_names.for_other_programs(config.model.hf) == (MODEL, hub.model)
    monkeypatch.chdir(tmp_path)
    assert hub_names.for_other_programs("../base") == (str(tmp_path.parent / "base"), None)
    assert hub_names.for_other_programs("owner/name") == (str(tmp_path / "owner/name"), None)


def test_a_resumed_run_uses_the_commit_with_which_it_began(hub, tmp_path):
    config = hub_names.resolved(load(tmp_path))
    run_directory.begin(config, print)
    run_directory.end(tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert recorded["model.hf"]["path"] == f"hf://{MODEL}@{hub.model}"
    later = hub.commit("model", MODEL, folder(LAPTOP / "base", **{"later.txt": "1"}))
    assert hub_names.resolved(load(tmp_path)) == config
    assert run_directory.check(config) == "unfinished"
    given = hub_names.resolved(load(tmp_path, f"model.hf={MODEL}@{later}"))
    overwritten = hub_names.resolved(load(tmp_path, "run.overwrite=true"))
    assert given.model.hf == overwritten.model.hf != config.model.hf
    # without a network, from the cache
    hub.commits.clear()
    assert hub_names.resolved(configuration.load(tmp_path / "run" / "config.yaml")) == config


def test_each_setting_resumes_at_its_own_commit(hub, tmp_path):
    """One repository, trained on as it is now and evaluated as it was."""
    now = hub.commit("dataset", DATA, FILES)
    sets = f"data.eval={{old: {PLACES[2].partition('=')[2].replace(DATA, f'{DATA}@{hub.data}')}}}"
    config = hub_names.resolved(load(tmp_path, sets))
    run_directory.begin(config, print)
    hub.commit("dataset", DATA, FILES)
    resumed = hub_names.resolved(load(tmp_path, sets))
    assert now in resumed.data.train and hub.data in resumed.data.eval["old"]
    assert resumed == config
    # a revision that is given counts, and so does another repository
    given = hub_names.resolved(
        load(tmp_path, f"data.train=hf://datasets/{DATA}@{hub.data}/main/t*n-*")
    )
    assert hub.data in given.data.train
    other = hub.commit("dataset", "openai/other", FILES)
    given = hub_names.resolved(load(tmp_path, "data.train=hf://datasets/openai/other/main/train-*"))
    assert other in given.data.train


def test_a_revision_may_have_a_slash(hub, tmp_path):
    assert hub_names.Name.of("openai/gsm8k@refs%2Fpr%2F1", "dataset").revision == "refs/pr/1"


def test_a_folder_of_a_data_set_stands_for_its_files(hub, tmp_path):
    hub.commit(
        "dataset",
        DATA,
        {f"train/{i}.jsonl": FILES["main/train-00000-of-00001.jsonl"] for i in "ab"},
    )
    for place in (
        f"hf://datasets/{DATA}/train",
        f"hf://datasets/{DATA}/train/",
        f"hf://datasets/{DATA}/",
    ):
        files = rows.data_files(hub_names.data(place))
        assert [file.name for file in files] == ["a.jsonl", "b.jsonl"], place


def test_a_place_of_a_command_line_is_fetched_or_left_as_it_is(hub, tmp_path):
    assert hub_names.model(MODEL).name == hub.model
    assert hub_names.model(LAPTOP / "base") == LAPTOP / "base"
    suite = hub_names.data(f"hf://datasets/{DATA}@{hub.data}/main/test-*.jsonl")
    assert rows.num_rows(suite) == 400 and hub_names.data("a.jsonl") == "a.jsonl"


def test_a_plan_reads_no_weights(hub, tmp_path):
    hub_names.resolved(load(tmp_path), weights=False)
    assert not any("safetensors" in request for request in hub.requests)


def test_what_is_here_under_the_name_comes_first(hub, tmp_path):
    (tmp_path / "Qwen" / "Qwen2.5-0.5B").mkdir(parents=True)
    assert "model.hf" not in hub_names.names(load(tmp_path).model, load(tmp_path).data)
    for place in ("./Qwen/other", "/Qwen/other", "Qwen", "data/train.jsonl", "a/b/c", "a/*"):
        assert hub_names.Name.of(place, "model") is None, place


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.hf=runs/absent", r"no such file or folder: model\.hf=runs/absent; asked for this"),
        (f"model.hf={MODEL}@v9", "does not have this revision of it"),
        (f"data.train=hf://datasets/{DATA}/none/*", r"hf://datasets/openai/gsm8k/none/\* has no s"),
        (f"data.train={DATA}", r"openai/gsm8k has files of several folders or splits \(main/test"),
        ("model.hf=hf://Qwen", "hf://Qwen is no name on the hub, such as hf://OWNER/MODEL@REV"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_in_terms_of_the_hub(hub, tmp_path, setting, message):
    with pytest.raises(UserError, match=message) as caught:
        hub_names.resolved(load(tmp_path, setting))
    assert str(tmp_path / "cache") not in str(caught.value)


def test_commands_take_a_name(hub, tmp_path, capsys, monkeypatch):
    assert cli.main(["plan", str(LAPTOP / "prepo.yaml"), *PLACES, "--gpus", "2"]) in (0, 1)
    assert "laptop" not in capsys.readouterr().err
    assert cli.main(["evaluate", "--model", "absent/model", "--out", "out"]) == 2
    assert "absent/model" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["convert", "import", "--hf", "absent/model", "--out", "o"])
    assert converter.main() == 2
    assert "absent/model" in capsys.readouterr().err


def test_tools_take_a_name(hub, capsys, monkeypatch):
    def stop(config):
        raise UserError(f"read {config.model.hf}")

    monkeypatch.setattr(preflight, "check", stop)
    words = [str(LAPTOP / "prepo.yaml"), *PLACES, "--out"]
    monkeypatch.setattr(sys, "argv", ["perplexity.py", *words, "result.json"])
    assert perplexity.main() == 2
    assert compare_logprobs.main([*words, "compared"]) == 2
    assert capsys.readouterr().err.count(f"snapshots/{hub.model}") == 2


def test_without_a_network_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"model\.hf=Qwen/Qwen2\.5-0\.5B; .*offline mode"):
        hub_names.resolved(load(tmp_path))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'huggingface_hub: pip install -e "\.\[data\]"'):
        hub_names.resolved(load(tmp_path))


def test_an_arms_names_are_pinned_for_all_of_a_comparison(hub, tmp_path):
    assert hub_names.pins(load(tmp_path)) == [
        f"model.hf=hf://{MODEL}@{hub.model}",
        f"data.train=hf://datasets/{DATA}@{hub.data}/main/train-*.jsonl",
        f"data.eval=hf://datasets/{DATA}@{hub.data}/main/test-*.jsonl",
    ]


def test_a_comparison_resumes_at_its_commits(hub, tmp_path):
    def planned():
        return runner.plan(
            LAPTOP / "prepo.yaml", parse_arms("prepo,random"), [1, 2], tmp_path / "runs", PLACES
        )

    before = planned()
    run_directory.begin(hub_names.resolved(before[1].config), print)
    hub.commit("model", MODEL, folder(LAPTOP / "base", **{"later.txt": "1"}))
    hub.commit("dataset", DATA, FILES)
    assert [run.overrides for run in planned()] == [run.overrides for run in before]


def test_an_upload_has_all_files_but_the_marker(hub, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors", ".megatron-prepo.json"):
        (out / name).write_text(name)
    hub_names.prepare("me/mine", private=True)
    address = hub_names.upload(out, "me/mine")
    assert address.startswith(f"{hub.url}/me/mine/commit/")
    assert sorted(hub.uploads["me/mine"]) == ["config.json", "model.safetensors"]
    assert hub.created == {"me/mine": "private"}
    hub_names.prepare("me/mine", private=True)  # again, after a failed upload
    hub_names.prepare("me/other")
    assert hub.created["me/other"] is None, "as the owner has set, not public in any case"
    with pytest.raises(UserError, match="--push mine must have the form OWNER/NAME"):
        hub_names.prepare("mine")


def test_what_is_private_never_reaches_a_public_repository(hub, tmp_path, monkeypatch, capsys):
    hub_names.prepare("me/open")
    with pytest.raises(UserError, match=r"me/open --private: .* everyone can read it; .*/settings"):
        hub_names.prepare("me/open", private=True)
    export = ["convert", "export", "--megatron", str(tmp_path), "--out", "out", "--private"]
    monkeypatch.setattr(sys, "argv", export)
    assert converter.main() == 2
    assert "name its repository: --push OWNER/NAME" in capsys.readouterr().err


def test_nothing_is_created_if_the_output_exists(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    export = ["convert", "export", "--megatron", str(tmp_path), "--out", "out", "--push", "me/new"]
    monkeypatch.setattr(sys, "argv", export)
    assert converter.main() == 2
    assert "--out out exists" in capsys.readouterr().err and not hub.created


def test_a_token_that_may_not_write_is_found_before_the_export(hub):
    hub.created["me/mine"] = None
    for hub.refused, repo in (("auth-check/write", "me/mine"), ("repos/create", "they/new")):
        with pytest.raises(UserError, match=rf"--push {repo}: .*; log in with a token that may do"):
            hub_names.prepare(repo)


def test_a_failed_upload_names_the_command_that_resumes_it(hub, tmp_path):
    out = tmp_path / "a model"
    out.mkdir()
    for name in ("config.json", ".megatron-prepo.json"):
        (out / name).write_text("{}")
    hub_names.prepare("me/mine")
    hub.refused = "/commit/"
    with pytest.raises(UserError, match=r"a model is complete; .* resumes the upload\)") as caught:
        hub_names.upload(out, "me/mine")
    hub.refused = "nothing"
    hf, *words = shlex.split(str(caught.value).split("`")[1])
    program = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    assert hf == "hf" and subprocess.run([*program, *words], capture_output=True).returncode == 0
    assert list(hub.uploads["me/mine"]) == ["config.json"]
