"""Proof that a run that is killed and resumed computes the same as an uninterrupted one.

    megatron-prepo resume --prove CONFIG

Trains twice for a few steps: once uninterrupted, and once killed (SIGKILL to all processes) after
the first of these steps and resumed.  Then all results of the two runs are compared, bit for bit.
They must be equal on a CPU, and on a GPU with deterministic kernels.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.files import lock, ownership
from megatron_prepo.models.raw import tensor_bytes
from megatron_prepo.models.torch_dist import TorchDistReader
from megatron_prepo.process import activity
from megatron_prepo.run import directory as run_directory
from megatron_prepo.run.texts import FOLDER

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Check:
    """The comparison of one kind of result."""

    what: str
    equal: bool
    detail: str


def prove(
    config: Path, overrides: Sequence[str], directory: Path, *, before: int, after: int
) -> list[Check]:
    """Make both runs, of `before + after` steps, in `directory`, and compare them.

    Raises UserError if a run fails.
    """
    ownership.claim(directory, "proof", "--dir")
    with lock.held(directory / lock.FILE, f"--dir {directory}"):
        return _prove(config, overrides, directory, before=before, after=after)


def _prove(
    config: Path, overrides: Sequence[str], directory: Path, *, before: int, after: int
) -> list[Check]:
    settings = [*overrides, f"train.total_steps={before + after}", "checkpoint.every=1"]
    settings += ["checkpoint.optimizer=true", "checkpoint.keep_last=2"]
    settings += ["run.overwrite=false"]
    whole, killed = directory / "whole", directory / "killed"
    for run in (whole, killed):
        _clear(config, settings, run)
    with activity.doing(lambda: f"uninterrupted run, {_state(whole, before + after)}"):
        _finish(_start(config, settings, whole), whole)
    process = _start(config, settings, killed)
    showing = activity.begin(lambda: f"run to be killed, {_state(killed, before)}")
    try:
        while process.poll() is None and num_lines(killed / "metrics.jsonl") < before:
            time.sleep(POLL_SECONDS)
    finally:  # also at Ctrl-C, which the run, in another session, does not get
        _kill(process)
        activity.end(showing)
    if process.returncode != -signal.SIGKILL:
        raise UserError(f"the run ended before it could be killed; see {killed}.log")
    with activity.doing(lambda: f"resumed run, {_state(killed, before + after)}"):
        _finish(_start(config, settings, killed), killed)
    return compare(whole, killed)


def _state(run: Path, num_steps: int) -> str:
    return f"step {num_lines(run / 'metrics.jsonl')} of {num_steps} (output: {run}.log)"


def compare(whole: Path, other: Path) -> list[Check]:
    """Compare two finished runs: weights, optimizer, random states, choices, ledger, metrics.

    Texts are compared if either run keeps them.
    """

    def newest(run: Path) -> Path:
        return max((run / "checkpoints").glob("iter_???????"))

    def checksums(run: Path, pattern: str) -> list[tuple[str, str]]:
        files = json.loads((newest(run) / "manifest.json").read_text())["files"]
        names = sorted(name for name in files if Path(name).match(pattern))
        return [(name, files[name]["sha256"]) for name in names]

    def tensors(run: Path) -> list[tuple[Any, ...]]:
        # not the files: newer versions of megatron-core pickle other objects into one of them
        reader = TorchDistReader(newest(run))
        return [(name, *_content(reader, name)) for name in sorted(reader.tensors)]

    def schedule(run: Path) -> list[tuple[Any, ...]]:
        common = TorchDistReader(newest(run)).common()
        return [("updates", common["updates"]), *common["opt_param_scheduler"].items()]

    def lines(name: str) -> Callable[[Path], list[bytes]]:
        return lambda run: (run / name).read_bytes().splitlines()

    def choices(run: Path) -> list[tuple[Any, ...]]:
        ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
        return [(entry["step"], entry["prompt_id"], entry["sample"]) for entry in ledger]

    def texts(run: Path) -> list[bytes]:
        paths = sorted((run / FOLDER).glob("*.jsonl"))
        return [line for path in paths for line in path.read_bytes().splitlines()]

    def exported(run: Path) -> list[tuple[str, bytes]]:
        # except the marker, which has the identity of the run
        files = sorted(p for p in (run / "hf").rglob("*") if p.name not in ownership.NOT_CONTENT)
        return [(path.name, path.read_bytes()) for path in files if path.is_file()]

    reads: dict[str, Callable[[Path], Sequence[Any]]] = {
        "exported weights": exported,
        "weights and optimizer": tensors,
        "schedule": schedule,
        "random states": lambda run: checksums(run, "random_*"),
        "selected prompts": choices,
        "ledger": lines("ledger.jsonl"),
        "metrics, but seconds": lambda run: without_seconds(run / "metrics.jsonl"),
        "evaluations, but seconds": lambda run: without_seconds(run / "evaluations.jsonl"),
    }
    if (whole / FOLDER).is_dir() or (other / FOLDER).is_dir():
        reads["texts"] = texts
    return [_check(what, read(whole), read(other)) for what, read in reads.items()]


def _content(reader: TorchDistReader, name: str) -> tuple[Any, ...]:
    """Return type, shape and digest of a tensor; -0.0 differs from 0.0, and NaN equals NaN."""
    shape = reader.shape(name)
    tensor = reader.read(name, (0,) * len(shape), shape)
    return tensor.dtype, shape, hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def text(checks: Sequence[Check]) -> str:
    """Format one line per check."""
    return "\n".join(
        f"{'equal' if check.equal else 'DIFFERS':<8} {check.what:<26} {check.detail}"
        for check in checks
    )


CLOCKED = ("seconds", "speed/")
"""Metrics that differ from run to run."""


def without_seconds(path: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics or evaluations, without measured times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


def num_lines(path: Path) -> int:
    """Return the number of complete lines of a file; 0 if it does not exist yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _check(what: str, whole: Sequence[Any], other: Sequence[Any]) -> Check:
    if whole == other:
        return Check(what, True, f"{len(whole):,} entries")
    if len(whole) != len(other):
        return Check(what, False, f"{len(whole):,} entries, and {len(other):,}")
    first = next(i for i, pair in enumerate(zip(whole, other, strict=True)) if pair[0] != pair[1])
    name = whole[first][0] if isinstance(whole[first], tuple) else first
    return Check(what, False, f"the first of {len(whole):,} entries that differs: {name}")


def _clear(config: Path, settings: Sequence[str], run: Path) -> None:
    """Remove the run of an earlier proof."""
    where = f"run.dir={configuration.literal(run)}"
    replaced = configuration.load(config, [*settings, where, "run.overwrite=true"])
    run_directory.check(replaced)
    run_directory.clear(replaced, lambda line: print(line, file=sys.stderr))


def _start(config: Path, settings: Sequence[str], run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megatron_prepo", "train", str(config), *settings]
    with open(f"{run}.log", "a") as log:
        return subprocess.Popen(
            [*command, f"run.dir={configuration.literal(run)}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _finish(process: subprocess.Popen[bytes], run: Path) -> None:
    try:
        if process.wait():
            raise UserError(f"a run failed; see {run}.log")
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a run with its ranks; not one that has ended, whose number may be another's by now."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # until it is waited for, it is there
        process.wait()
