"""Measure everything that needs a GPU in one command, the most valuable first, within a budget.

    python tools/checks/gpu_check.py --out FOLDER --budget 540 [--verl FOLDER]
    python tools/checks/gpu_check.py --out FOLDER --budget 540 --parts sglang --sglang FOLDER
    python tools/checks/gpu_check.py --out FOLDER --budget 240 --parts real --real FOLDER

The parts, in order: the output head (tools/bench/head.py, with its stages and chunk sizes), the
share of the GPU's peak in training (utilisation.py), the tests marked `gpu`, a plan's memory
(plan.py), the demo, and how long a run waits for a checkpoint (checkpoint.py).  In a separate
command: training with an SGLang server on the same GPU, with weight sync by CUDA IPC, and that
sync at the shape of a 7B model, from the archives of pack_sglang.py.  In another, where time is
left: 50 steps of a pretrained model (examples/real).

Each part has a share of the remaining time, so that later parts get what one does not use, and is
stopped at its end.  FOLDER, new or empty, gets one JSON file per part, with what a stopped part has
measured, and summary.md, which is printed last.  A part whose file exists is skipped, unless
`--again` names it.  Exit code 0 means that every selected part passed.

`--rehearse` runs all of it at a tiny size without a GPU; its files and its summary are marked, and
a folder has rehearsals or measurements, never both.  docs/gpu.md has the two commands for a
machine without network (pack_gpu.py).
"""

import argparse
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.errors import UserError
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import ownership
from megatron_prepo.files.existing import existing
from megatron_prepo.process import activity
from megatron_prepo.process.command import in_one_line
from tools.checks import gpu_summary
from tools.checks.gpu_parts import APART, PARTS, Options, Part

BUDGET_SECONDS = 540.0
"""Ten minutes per command, less the start and the end of this one."""
LEAST_SECONDS = 5.0
"""A part is not started with less: it then has no file, and the summary names it."""
KIND = "GPU check"
"""Kind of the folder of results in its marker (`ownership.py`)."""
UNFINISHED = ".partial"
OUTPUT_CHARACTERS = 20_000
"""The end of a part's output that its file has."""


@in_one_line
def main() -> int:
    """Run the selected parts; print and write the summary."""
    end = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds in total")
    default = [name for name in PARTS if name not in APART]
    parser.add_argument("--parts", type=known, default=default, help="default: the first command's")
    parser.add_argument("--again", type=known, default=[], help="parts to repeat")
    parser.add_argument("--verl", type=existing(), help="as in tools/bench/head.py")
    parser.add_argument("--sglang", type=existing(), help="folder with archives of pack_sglang.py")
    parser.add_argument("--real", type=existing(), help="folder that pack_gpu.py --real fills")
    parser.add_argument("--rehearse", action="store_true", help="a tiny size, without a GPU")
    words = parser.parse_args()
    if not words.rehearse and not _has_gpu():
        print("error: no CUDA device; --rehearse runs a tiny size without one", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    for name in APART:
        if name in words.parts and vars(words)[name] is None:
            raise UserError(f"--parts {name} needs --{name} FOLDER (docs/gpu.md)")
    options = Options(words.verl, words.sglang, words.real, rehearse=words.rehearse)
    parts = {name: PARTS[name] for name in words.parts}
    with activity.handed_over():  # the parts' processes show what they do
        return check(parts, options, words.out, end + words.budget, words.again)


def check(parts: dict[str, Part], options: Options, out: Path, end: float, again: list[str]) -> int:
    """Run the parts in turn until `end`, by `time.monotonic`; each result is on disk when known."""
    results = {}
    for name in parts:
        earlier = earlier_result(out / f"{name}.json", name, rehearse=options.rehearse)
        if earlier and name not in again:
            results[name] = earlier
    ownership.claim(out, KIND, "--out")
    to_run = [name for name in parts if name not in results]
    for number, name in enumerate(to_run):
        shares = [parts[later].share for later in to_run[number:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        if seconds < LEAST_SECONDS:  # no file: the same command starts it when there is time
            results[name] = gpu_summary.NOT_STARTED
        else:
            print(f"{name}: at most {seconds:.0f} s", flush=True)
            kind = {"part": name, "rehearsal": options.rehearse}
            results[name] = kind | run(parts[name], options, out, name, seconds)
            durable.write_text(out / f"{name}.json", json.dumps(results[name], indent=1) + "\n")
            _remove_unfinished(out, name)
        durable.write_text(out / "summary.md", gpu_summary.markdown(results) + "\n")
    print(gpu_summary.markdown({name: results[name] for name in parts}))
    return int(not all(results[name]["passed"] for name in parts))


def run(part: Part, options: Options, out: Path, name: str, seconds: float) -> dict[str, Any]:
    """Return the result of a part; its own failure, of whatever kind, is one."""
    _remove_unfinished(out, name)
    try:
        result = part.run(options, out / f"{name}{UNFINISHED}.json", seconds)
    except Exception:  # the parts after it are still worth their time
        result = {"passed": False, "output": traceback.format_exc()}
    return result | {"output": result["output"][-OUTPUT_CHARACTERS:]}


def earlier_result(file: Path, name: str, *, rehearse: bool) -> dict[str, Any] | None:
    """Return the result of an earlier call.

    Raises UserError for a file that is none, and for a rehearsal among measurements or the reverse.
    """
    if not file.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        ours = result.get("part") == name and result.get("rehearsal") in (True, False)
    except (ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"--out: {file} exists, and is no result of this command; choose another")
    if result["rehearsal"] != rehearse:
        kind = "a rehearsal" if result["rehearsal"] else "a measurement"
        raise UserError(f"--out: {file} is the result of {kind}; choose another folder")
    return result


def known(words: str) -> list[str]:
    """Return the names of parts in a list with commas, in the order of their value."""
    names = words.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def _remove_unfinished(out: Path, name: str) -> None:
    for suffix in (".json", ".md"):
        (out / f"{name}{UNFINISHED}{suffix}").unlink(missing_ok=True)


def _has_gpu() -> bool:
    import torch  # after the clock has started: this takes seconds

    return torch.cuda.is_available()


def _stop(*_: object) -> None:
    """Stop the current part on SIGTERM, too: without this, its processes would keep the GPU."""
    raise KeyboardInterrupt("stopped; the same command resumes after the last complete part")


if __name__ == "__main__":
    sys.exit(main())
