"""The directory of a run.

| file | what |
|---|---|
| `config.yaml` | the resolved configuration |
| `metrics.jsonl` | one object a step |
| `evaluations.jsonl` | one object an evaluation |
| `ledger.jsonl` | one object a rollout |
| `summary.json` | the result |
| `pass_rate.png` | the result as a picture |
| `checkpoints/` | Megatron checkpoints |
| `hf/` | the trained model in Hugging Face format |
| `logs/` | what ranks other than 0 printed, and errors |
"""

import shutil
from pathlib import Path

import yaml

from megatron_prepo.config import Config, to_tree
from megatron_prepo.durable import write_text
from megatron_prepo.errors import UserError

OURS = (
    "config.yaml",
    "metrics.jsonl",
    "evaluations.jsonl",
    "ledger.jsonl",
    "summary.json",
    "pass_rate.png",
    "checkpoints",
    "hf",
)
"""What a run writes, and `run.overwrite` removes; anything else in the directory is left alone."""


def check_free(config: Config) -> None:
    """UserError if the directory holds a run that may not be replaced."""
    directory = Path(config.run.dir)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file; choose a directory")
    if (directory / "config.yaml").exists() and not config.run.overwrite:
        raise UserError(
            f"run.dir={directory} already holds a run; choose another directory, or set "
            "run.overwrite=true to replace it"
        )


def create(config: Config) -> Path:
    """Make room for the run and save its configuration; on rank 0 only."""
    check_free(config)
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    for name in OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_text(directory / "config.yaml", yaml.safe_dump(to_tree(config), sort_keys=False))
    return directory
