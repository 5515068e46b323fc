"""Resume a run that an older tree began."""

import json
import tarfile

from rounding import CHAIN, approx
from torch import float32

from megatron_prepo.cli import main
from tests.e2e.laptop import REPOSITORY, metrics

KILLED = REPOSITORY / "tests" / "data" / "run_of_d7965c3.tar.xz"
"""Run of commit d7965c3, before modules moved into folders: killed in step 5 of 6, checkpoint at 4.

    megatron-prepo train examples/laptop/prepo.yaml run.dir=runs/begun train.total_steps=6 \\
      parallel.tensor=1 selection.num_candidates=24 selection.num_selected=8 \\
      rollout.samples_per_prompt=4 eval.max_prompts=8 eval.samples_per_prompt=1 eval.every=3 \\
      checkpoint.every=2 checkpoint.keep_last=1
"""
UNINTERRUPTED = {
    4: {"ppl/selected/mean": 2.0706343885205927, "selection/window_first": 12},
    5: {"ppl/selected/mean": 2.1426866115709657, "selection/window_first": 16},
}
"""Metrics of the last two steps of the same command, not killed, by that commit."""


def test_a_run_of_an_older_tree_resumes(tmp_path, monkeypatch):
    """The run resumes with its weights and its optimizer's state: step 4 has the killed run's
    rollouts, from its journal, so that step 5 sees the uninterrupted run's weights on any
    processor."""
    monkeypatch.chdir(REPOSITORY)  # the paths in its config.yaml are relative
    with tarfile.open(KILLED) as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "begun"
    before = (run / "metrics.jsonl").read_text().splitlines()
    ledger = (run / "ledger.jsonl").read_text()
    assert main(["resume", str(run)]) == 0
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert after[:4] == before[:4] and len(after) == 6
    assert (run / "ledger.jsonl").read_text().startswith(ledger)
    for step, expected in UNINTERRUPTED.items():
        found = {name: metrics(run)[step][name] for name in expected}
        assert found == approx(expected, CHAIN if step == 4 else 100 * CHAIN, dtype=float32)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    assert (run / "hf" / "config.json").is_file()
