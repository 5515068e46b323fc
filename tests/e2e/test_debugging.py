"""Dump, replay, inspect and rollout-only, through the command line as a user would."""

import json
import shutil
import sys
from pathlib import Path

import pandas
import pytest
import torch
from rounding import approx
from safetensors.torch import load_file, save_file

from megatron_prepo.cli import main
from megatron_prepo.process import local_ranks
from tests.e2e.laptop import LAPTOP, SHORT, metrics, train
from tools.inspect.step import groups_of_dump, groups_of_run
from tools.inspect.step import main as inspect_step

CANARY = "canary-5f1d"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps at TP 1, the second one dumped, with what looks like secrets in the environment."""
    directory = tmp_path_factory.mktemp("dumped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY"):
            patch.setenv(name, CANARY)
        overrides = ["parallel.tensor=1", "debug.dump_steps=[1]", "texts.rollouts=4"]
        assert train(directory, *SHORT, *overrides) == 0
    return directory


def test_a_dump_is_replayed_in_another_layout(run, capfd):
    """The dump is replayed at TP2 with other micro-batches; it has no gradients, so one rank
    computes them first."""
    dump = run / "dumps" / "step_0001"
    bare = shutil.copytree(dump, run.parent / "bare")
    about = json.loads((bare / "step.json").read_text())
    for result in about["results"]:
        shutil.rmtree(bare / result["gradients"])
        result["gradients"] = None
    (bare / "step.json").write_text(json.dumps(about))
    assert main(["replay", str(bare), "parallel.tensor=2", "train.micro_batch_tokens=256"]) == 0
    assert "one rank computes them first" in capfd.readouterr().out
    for number in range(2):  # one rank, as in the run: to the bit
        made = load_file(bare / "one_rank" / f"gradients_{number}" / "model.safetensors")
        saved = load_file(dump / f"gradients_{number}" / "model.safetensors")
        assert all(torch.equal(made[name], saved[name]) for name in saved)


def test_a_gradient_that_differs_is_named_and_the_exit_code_tells(run, capfd):
    dump = shutil.copytree(run / "dumps" / "step_0001", run.parent / "wrong")
    file, name = dump / "gradients_1" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * 1.001}, file)
    assert main(["replay", str(dump)]) != 0
    captured = capfd.readouterr()
    assert f"differs from the dump in update 1: {name}\n" in captured.err
    assert "1 of 54 differ (tolerance 0.0001)" in captured.out


@pytest.mark.parametrize(
    ("path", "message"), [("absent", "is not a dump"), ("damaged", "is damaged: FileNotFoundError")]
)
def test_what_is_no_dump_is_refused(run, capsys, path, message):
    damaged = shutil.copytree(run / "dumps" / "step_0001", run.parent / path / "damaged")
    (damaged / "batch.safetensors").unlink()
    where = damaged if path == "damaged" else run.parent / "absent"
    assert main(["replay", str(where)]) == 2
    assert message in capsys.readouterr().err


def test_the_table_of_a_dump_is_that_of_the_ledger(run):
    from megatron_prepo import config as configuration
    from megatron_prepo.debug import dump

    config = configuration.load(run / "config.yaml")
    of_dump = groups_of_dump(dump.read(run / "dumps" / "step_0001"))
    of_run = {group.prompt_id: group for group in groups_of_run(run, 1, config)}
    assert len(of_dump) == len(of_run) == 8
    for group in of_dump:
        other = of_run[group.prompt_id]
        assert (group.ppl, group.prompt) == (other.ppl, other.prompt)
        assert group.rank == other.rank + 16  # the window is at the end, after 16 of 24
        for line, same in zip(group.rollouts, other.rollouts, strict=True):
            assert (line.reward, line.length) == (same.reward, same.length)
            for name in ("advantage", "weight", "entropy"):
                value = getattr(same, name)
                assert getattr(line, name) == approx(value, dtype=torch.float32)
            assert same.completion in (line.completion, None)
    kept = [group for group in of_run.values() if group.rollouts[0].completion]
    assert len(kept) == 4 and all(line.completion for group in kept for line in group.rollouts)


def test_the_inspector_says_what_there_is(run, capsys):
    assert inspect_step([str(run), "1"]) == 0
    with_dump = capsys.readouterr().out
    assert "####" in with_dump and "loss/grad_norm" in with_dump and "rank 24" in with_dump
    assert inspect_step([str(run), "0"]) == 0
    assert "no dump of this step" in capsys.readouterr().out
    assert inspect_step([str(run), "7"]) == 2
    assert "no rollouts of step 7" in capsys.readouterr().err


def test_nothing_that_the_run_wrote_holds_a_secret(run):
    files = [file for file in run.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]


LISTENERS = """
import json, os, psutil, sys, torch
from megatron_prepo.actor import parallel
from megatron_prepo.config import ParallelConfig

parallel.initialize(ParallelConfig(tensor=2), 1)
torch.distributed.all_reduce(torch.ones(1))
sockets = psutil.Process().net_connections("inet")
addresses = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
open(sys.argv[1] + os.environ["RANK"], "w").write(json.dumps(addresses))
torch.distributed.barrier()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface is called lo on Linux")
def test_ranks_that_we_start_listen_on_loopback_only(tmp_path):
    out = str(tmp_path / "addresses-")
    local_ranks.start([sys.executable, "-c", LISTENERS, out], 2, tmp_path)
    for rank in range(2):
        addresses = json.loads(Path(f"{out}{rank}").read_text())
        assert addresses and set(addresses) == {"127.0.0.1"}


def test_rollouts_without_updates(tmp_path):
    """Weights stay, and the rollouts are in the ledger with their entropies and weights."""
    directory = tmp_path / "run"
    assert train(directory, *SHORT, "parallel.tensor=1", "debug.mode=rollout") == 0
    ledger = pandas.read_json(directory / "ledger.jsonl", lines=True)
    assert len(ledger) == 2 * 8 * 4 and (ledger.weight_version == 0).all()
    assert ledger.weight.notna().all()
    for step in metrics(directory):
        assert step["loss/skipped_updates"] == 2 and "loss/policy" not in step
    base, after = (load_file(d / "model.safetensors") for d in (LAPTOP / "base", directory / "hf"))
    assert all(torch.equal(base[name], after[name]) for name in base)
