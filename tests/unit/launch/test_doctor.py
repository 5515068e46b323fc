"""The doctor: installed parts are ok; parts that a run needs and lacks are listed with a remedy."""

import json
import shutil
import socket
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from megatron_prepo import config as configuration
from megatron_prepo.cli import main
from megatron_prepo.errors import UserError
from megatron_prepo.launch import doctor
from megatron_prepo.launch.doctor import GIB
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.process import slurm as nodes
from tests.e2e.laptop import LAPTOP, REPOSITORY


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    # W&B keeps its offline mode for the entire process
    monkeypatch.setattr(doctor.dashboards, "check", lambda config: None)


def laptop(*overrides: str) -> configuration.Config:
    return configuration.load("examples/laptop/prepo.yaml", overrides)


def found(findings, what: str) -> doctor.Finding:
    (finding,) = [finding for finding in findings if finding.what == what]
    return finding


def test_the_laptop_example_lacks_nothing(capsys, tmp_path):
    assert main(["doctor", "examples/laptop/prepo.yaml", f"run.dir={tmp_path / 'run'}"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    for part in ("megatron-core", "800 prompts", "tensor 2 x pipeline 1", "nothing that is needed"):
        assert part in table
    assert not (tmp_path / "run").exists()


def test_without_a_configuration_only_the_machine_is_looked_at():
    findings = doctor.examine()
    assert not [finding for finding in findings if finding.state == "missing"]
    assert found(findings, "torch").found == metadata.version("torch")
    assert "tokenizer" not in [finding.what for finding in findings]


@pytest.mark.parametrize(
    "change",
    [UserError("changed"), ImportError("changed", name="megatron.core.optimizer")],
)
def test_a_release_that_has_changed_what_we_replace_is_missing(change, monkeypatch):
    real = doctor.importlib.import_module

    def importing(name):
        if name == "megatron_prepo.actor.actor":
            raise change
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", importing)
    finding = found(doctor.examine(), "internals")
    assert finding.state == "missing" and "changed" in finding.found and finding.remedy


def test_a_model_without_weights_and_tokenizer(capsys, tmp_path):
    shutil.copy(LAPTOP / "base" / "config.json", tmp_path)
    words = ["doctor", "examples/laptop/prepo.yaml", f"model.hf={tmp_path}"]
    assert main(words) == 1
    table = capsys.readouterr().out
    assert "no *.safetensors" in table.replace("\n" + " " * 27, " ") or "safetensors" in table
    assert "tokenizer.json" in table
    findings = doctor.examine(laptop(f"model.hf={tmp_path}"))
    states = {finding.what: finding.state for finding in findings}
    assert (states["model"], states["weights"], states["tokenizer"]) == ("ok", "missing", "missing")
    assert "data.train" not in states
    for what in ("weights", "tokenizer"):
        assert "model.hf=DIR" in found(findings, what).remedy


@pytest.mark.parametrize(
    ("override", "what", "expected"),
    [
        ("parallel.tensor=3", "layout", "num_attention_heads=4"),
        ("megatron.recompute_granularity=full", "layout", "megatron-core rejected"),
        ("data.max_prompt_tokens=20", "data.train", "more than data.max_prompt_tokens=20"),
        ("data.eval=absent.jsonl", "data.eval", "absent.jsonl"),
        ("data.few_shot=absent.jsonl", "data.few_shot", "absent.jsonl"),
        ("model.hf=absent", "model", "config.json is missing"),
        ("model.megatron=absent", "weights", "absent"),
    ],
)
def test_what_a_run_would_refuse_is_missing(override, what, expected):
    finding = found(doctor.examine(laptop(override)), what)
    assert finding.state == "missing" and expected in finding.found


def test_prompts_are_looked_for_without_a_tokenizer_too(tmp_path):
    shutil.copy(LAPTOP / "base" / "config.json", tmp_path)
    findings = doctor.examine(laptop(f"model.hf={tmp_path}", "data.train=absent.jsonl"))
    train = found(findings, "data.train")
    assert train.state == "missing" and "tools/data/prepare.py" in train.remedy
    assert "data.eval" not in [finding.what for finding in findings]


def test_a_length_beyond_the_models_positions_is_said():
    finding = found(doctor.examine(laptop("rollout.max_new_tokens=250")), "length")
    assert finding.state == "note" and "346 tokens of the model's 256" in finding.found


def test_a_directory_that_holds_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    finding = found(doctor.examine(laptop(f"run.dir={tmp_path}")), "run.dir")
    assert (
        finding.state == "missing"
        and "config.yaml in it is not known to be a run's" in finding.found
    )


def test_another_models_tokenizer_is_said(tmp_path):
    shutil.copytree(LAPTOP / "base", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 200}))
    finding = found(doctor.examine(laptop(f"model.hf={tmp_path / 'model'}")), "vocabulary")
    assert finding.state == "note" and "259 tokens, the model 200" in finding.found


@pytest.mark.parametrize(
    "fault",
    [
        "raise ImportError('libcudart.so.99: cannot open shared object file')",
        "raise OSError('libcudart.so.99')",
        "import libcudart_so_99",
    ],
)
def test_a_broken_build_is_told_from_an_absent_one(tmp_path, monkeypatch, fault):
    (tmp_path / "broken_package.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    package = doctor.Package("broken_package", ("broken-package",), "build it again")
    finding = doctor._package("broken", package, needed=True)
    assert finding.state == "missing" and finding.remedy == "build it again"
    assert "import fails" in finding.found and "libcudart" in finding.found
    absent = doctor.Package("absent_package.part", ("absent-package",), "install it")
    assert doctor._package("absent", absent, needed=False) == doctor.Finding(
        "absent", "note", "not installed", "install it"
    )
    sys.modules.pop("broken_package", None)


def test_what_is_needed_depends_on_the_run():
    findings = doctor.examine(laptop("model.layers=te"))
    assert found(findings, "TransformerEngine").state == "missing"
    assert found(findings, "GPU").state == "missing"
    assert found(findings, "layout").state == "ok"
    plain = doctor.examine(laptop())
    assert found(plain, "TransformerEngine").state == found(plain, "GPU").state == "note"


def test_servers_in_another_environment_are_asked_there():
    """The trainer's own environment need not have SGLang then."""
    engine = "rollout.engine=sglang"
    own = doctor.examine(laptop(engine))
    assert "servers" not in [finding.what for finding in own]
    apart = doctor.examine(laptop(engine, f"servers.python={sys.executable}"))
    assert found(apart, "servers").state == found(own, "SGLang").state
    assert found(apart, "SGLang").state != "missing"
    gone = found(doctor.examine(laptop(engine, "servers.urls=[http://127.0.0.1:1]")), "servers")
    assert gone.state == "missing" and "no answer from http://127.0.0.1:1/health" in gone.found


@pytest.mark.parametrize(
    ("override", "what", "module"),
    [
        ("reward.function=math", "math-verify", "math_verify"),
        ("run.tensorboard=true", "TensorBoard", "torch.utils.tensorboard"),
        ("run.wandb_project=mine", "Weights & Biases", "wandb"),
    ],
)
def test_what_a_setting_asks_for_is_needed_only_then(override, what, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    finding = found(doctor.examine(laptop(override)), what)
    assert finding.state == "missing" and "pip install" in finding.remedy
    assert found(doctor.examine(laptop()), what).state == "note"
    monkeypatch.undo()
    monkeypatch.chdir(REPOSITORY)
    assert found(doctor.examine(laptop(override)), what).state == "ok"


def test_a_login_that_is_missing_is_said(monkeypatch):
    def check(config):
        raise UserError("no W&B API key found")

    config = laptop("run.wandb_project=mine")
    assert found(doctor.examine(config), "dashboards").found == "Weights & Biases"
    monkeypatch.setattr(doctor.dashboards, "check", check)
    assert found(doctor.examine(config), "dashboards").state == "missing"
    assert "dashboards" not in [finding.what for finding in doctor.examine(laptop())]


def test_packages_are_the_jobs_and_not_the_login_nodes(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    whats = [finding.what for finding in doctor.examine_inputs(laptop("run.wandb_project=mine"))]
    assert not {"Weights & Biases", "torch", "NeMo-Run"} & set(whats)


@pytest.fixture
def taken():
    """Port that is in use."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_taken_port(monkeypatch, taken):
    monkeypatch.setenv("MASTER_PORT", str(taken))
    finding = doctor._port()
    assert (finding.state, finding.found) == ("note", f"{taken} is taken")
    monkeypatch.delenv("MASTER_PORT")
    assert doctor._port().state == "ok"


def test_the_ports_of_a_slurm_job(monkeypatch, taken):
    """Ports of ranks and servers follow from the job's number, so none can be chosen instead."""
    monkeypatch.setenv("SLURM_JOB_ID", "4217")
    finding = doctor._port()
    assert (finding.state, finding.found) == ("ok", "20544 to 20575, this job's, are free")
    monkeypatch.setattr(nodes, "ports", lambda slurm: range(taken, taken + 1))
    finding = doctor._port()
    assert finding.state == "missing" and f"{taken} is taken" in finding.found


SGLANG = ("rollout.engine=sglang", f"servers.python={sys.executable}")


def test_ports_of_own_servers_are_tried_at_their_address():
    finding = found(doctor.examine(laptop(*SGLANG, "servers.count=3")), "server ports")
    assert (finding.state, finding.found) == ("ok", "3 free at 127.0.0.1")
    for host in ("192.0.2.1", "no.such.host.invalid"):  # an address for examples, of no machine
        finding = found(doctor.examine(laptop(*SGLANG, f"servers.host={host}")), "server ports")
        assert finding.state == "missing" and f"servers.host={host}" in finding.found
    whats = [finding.what for finding in doctor.examine(laptop())]
    assert "server ports" not in whats and "weight sync" not in whats


def test_open_files_and_a_reward_of_ones_own_are_looked_at(tmp_path):
    finding = found(doctor.examine(laptop(*SGLANG)), "open files")
    assert (finding.state, finding.found) == ("ok", "room for 256 per server")
    many = laptop(*SGLANG, "servers.concurrency=900000000")
    finding = found(doctor.examine(many), "open files")
    assert finding.state == "missing" and "may need 900,000,256 open files" in finding.found
    (tmp_path / "mine.py").write_text("def f(completion): ...\n")
    mine = laptop(f"reward.function={tmp_path / 'mine.py'}:f")
    finding = found(doctor.examine(mine), "reward")
    assert finding.state == "missing" and "mine.py:f(completion) does not fit" in finding.found
    mine = laptop(f"selection.method={tmp_path / 'mine.py'}:f")
    finding = found(doctor.examine(mine), "selector")
    assert finding.state == "missing" and "mine.py:f is a function" in finding.found


def test_servers_have_to_find_rank_0():
    sync = "weight_sync.transport=distributed"
    finding = found(doctor.examine(laptop(*SGLANG, sync)), "weight sync")
    assert (finding.state, finding.found) == ("ok", "rank 0 answers at 127.0.0.1")
    nowhere = [*SGLANG, sync, "weight_sync.address=no.such.host.invalid"]
    finding = found(doctor.examine(laptop(*nowhere)), "weight sync")
    assert finding.state == "missing" and "weight_sync.address=no.such.host" in finding.found
    away = ["rollout.engine=sglang", sync, "servers.urls=[http://192.0.2.1:30000]"]
    finding = doctor._weight_sync(laptop(*away))
    assert finding.state == "missing" and "would look for rank 0 on themselves" in finding.found


def test_gpus_as_torch_tells_of_them(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_properties", lambda i: SimpleNamespace(name="H100"))
    monkeypatch.setattr(cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(cuda, "mem_get_info", lambda i: (20 * GIB, 80 * GIB))
    findings = doctor._gpus(laptop("parallel.tensor=4"))
    assert found(findings, "GPU").found == "2 x H100, 80 GiB"
    assert found(findings, "NCCL").found == "2.27.3"
    assert "20 of 80 GiB free" in found(findings, "GPU memory").found
    assert "parallel.tensor=4" in found(findings, "tensor parallelism").found
    monkeypatch.setattr(cuda, "mem_get_info", lambda i: (79 * GIB, 80 * GIB))
    assert [finding.what for finding in doctor._gpus(laptop())] == ["GPU", "NCCL"]


def test_room_on_the_disk(monkeypatch, tmp_path):
    """Weights of 1 GiB: as much for the export, as much in a checkpoint, and 6 times it for
    Adam."""
    (tmp_path / "model.safetensors").touch()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(GIB)

    hf = read_hf_config(LAPTOP / "base")

    def with_free(gib: float, *overrides: str) -> doctor.Finding:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=gib * GIB))
        return doctor._disk(laptop(f"model.hf={tmp_path}", *overrides), hf)

    once = "checkpoint.every=0"
    assert with_free(7.9, once).state == "missing"
    assert with_free(8.1, once).state == "ok"
    assert "1 checkpoint and the exported model take about 8.0 GiB" in with_free(8.1, once).found
    # two are kept while a third is written
    assert with_free(21.9, "checkpoint.every=").state == "missing"
    assert with_free(22.1, "checkpoint.every=").state == "ok"
    kept = ("checkpoint.every=5", "checkpoint.keep_last=4")
    assert "5 checkpoints and" in with_free(22.1, *kept).found
    # adapters, here 1 Gi of numbers: 14 bytes of each in a checkpoint and 2 in the export, next to
    # the frozen weights
    of_rank_one = hf["num_hidden_layers"] * (hf["hidden_size"] + hf["intermediate_size"])
    adapters = (f"lora.rank={GIB // of_rank_one}", "lora.target_modules=[down_proj]")
    assert "take about 2.0 GiB" in with_free(2.1, once, "lora.rank=1").found
    assert "take about 18.0 GiB" in with_free(18.1, once, *adapters).found
    assert with_free(18.1, once, *adapters).state == "ok"
    weights_only = (once, *adapters, "checkpoint.optimizer=false")
    assert "take about 6.0 GiB" in with_free(17, *weights_only).found


@pytest.mark.parametrize(("release", "state"), [("false", "note"), ("true", "missing")])
def test_a_run_whose_servers_share_gpus_misses_them(monkeypatch, release, state):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (finding,) = doctor._gpus(laptop(*SGLANG, f"servers.release_memory={release}"))
    assert finding.what == "GPU" and finding.state == state
