"""`megatron-prepo compare` on the laptop task at a reduced size, interrupted and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_prepo.cli import main
from tests.e2e.laptop import FILES, LAPTOP, REPOSITORY, SHORT

TINY = [*FILES, *SHORT, "parallel.tensor=1", "eval.every=1"]


def start(directory: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_prepo", "compare", str(LAPTOP / "prepo.yaml")]
    options = ["--methods=random,prepo", "--seeds=1-2", f"--dir={directory}", "--jobs=2"]
    with open(directory.parent / "compare.log", "w") as log:
        return subprocess.Popen(
            [*command, *options, *TINY], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
        )


def finished(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*/summary.json"))


@pytest.mark.slow
def test_interrupted_and_gone_on_with(tmp_path):
    directory = tmp_path / "both"
    process = start(directory)
    while not finished(directory) and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, (tmp_path / "compare.log").read_text()
    done = {path: path.stat().st_mtime_ns for path in finished(directory)}
    assert 1 <= len(done) < 4
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        assert str(directory) not in arguments, f"still running: {arguments}"

    assert start(directory).wait() == 0, (tmp_path / "compare.log").read_text()
    assert len(finished(directory)) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "ran again"

    results = directory / "results.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["arm"], r["seed"]) for r in records] == [
        ("random", 1),
        ("random", 2),
        ("prepo", 1),
        ("prepo", 2),
    ]
    for record in records:
        assert [e["rollouts"] for e in record["evaluations"]] == [0, 32, 64]
        assert record["steps"]["rollout/paid"] == [32, 64]
        assert len(json.dumps(record)) < 12_000
    # both arms of a seed have the same evaluation: equal before any training
    before = [record["evaluations"][0]["pass_rate"] for record in records]
    assert before[0] == before[2] and before[1] == before[3]

    text = results.read_text()
    assert start(directory).wait() == 0
    assert results.read_text() == text

    out = tmp_path / "report.html"
    run = str(directory / "prepo" / "1")
    assert main(["report", str(directory), run, "--out", str(out)]) == 0
    page = out.read_text()
    assert "final pass rate" in page and "gain, prompt by prompt" in page
    assert (tmp_path / "both_pass_rate.png").exists()
