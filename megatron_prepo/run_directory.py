"""A run's directory: empty, or a run that may go on, or one that is finished and is not touched."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import yaml

from megatron_prepo import config as configuration
from megatron_prepo.config import Config, to_tree
from megatron_prepo.durable import write_text
from megatron_prepo.errors import UserError

OURS = (
    "config.yaml",
    "prompts.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "ledger.jsonl",
    "summary.json",
    "pass_rate.png",
    "checkpoints",
    "dumps",
    "journal",
    "hf",
    "tensorboard",
    "wandb",
    "profile",
)
"""What a run writes, and `run.overwrite` removes; anything else in the directory is left alone."""

FREE = (
    "run",
    "servers",
    "weight_sync",
    "checkpoint",
    "sglang",
    "reward.processes",
    "reward.max_failed",
    "train.max_skipped_updates",
    "debug.dump_steps",
    "debug.dump_gradients",
    "debug.max_skip_dumps",
    "profile",
)
"""Sections and settings that a run may go on with changed: they move no number."""

ROUNDING = (
    "parallel",
    "model.layers",
    "loss.head",
    "loss.head_memory_mib",
    "rollout.batch_size",
    "train.micro_batch_tokens",
    "train.packing",
    "train.share_prefixes",
)
"""Sections and settings that may change, too, but then float sums round differently."""


def check(config: Config) -> Literal["new", "unfinished"]:
    """What starting this run would do; UserError if the directory holds another, or a finished one.

    With `run.overwrite` every run is new.
    """
    directory = Path(config.run.dir)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file; choose a directory")
    _check_writable(directory)
    if config.run.overwrite or not (directory / "config.yaml").exists():
        return "new"
    if (directory / "summary.json").exists():
        raise UserError(
            f"run.dir={directory} already holds a run, which is finished; choose another "
            "directory, or set run.overwrite=true to replace it"
        )
    forbidden, _ = changes(saved_config(directory), config)
    if forbidden:
        raise UserError(
            f"run.dir={directory} already holds a run that other settings began: "
            f"{'; '.join(forbidden)}; go on with the old ones, choose another directory, or set "
            "run.overwrite=true to replace it"
        )
    return "unfinished"


def _check_writable(directory: Path) -> None:
    """UserError if a run could not write here; nothing is written for that."""
    place = directory
    while not place.exists():
        place = place.parent
    for folder in (place, *(directory / name for name in OURS)):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"run.dir={directory} cannot be written, since {folder} is read-only for this "
                "user; choose another directory, or change its permissions"
            )


def check_unfinished(directory: Path) -> None:
    """UserError unless a run in this directory can go on."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} holds no run: there is no config.yaml")
    if (directory / "summary.json").exists():
        raise UserError(f"the run in {directory} is finished")


def prepare(config: Config, say: Callable[[str], None]) -> Path:
    """Make room for the run, or leave what it goes on from; one process does it."""
    directory, state = Path(config.run.dir), check(config)
    directory.mkdir(parents=True, exist_ok=True)
    if state == "new":
        clear(directory)
    elif rounding := changes(saved_config(directory), config)[1]:
        say(
            f"the run goes on with {'; '.join(rounding)}: numbers agree with an uninterrupted "
            "run's up to rounding, and not to the bit"
        )
    write_text(directory / "config.yaml", yaml.safe_dump(to_tree(config), sort_keys=False))
    return directory


def clear(directory: Path) -> None:
    """Remove what a run wrote."""
    for name in OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def saved_config(directory: Path) -> Config:
    """The configuration of the run in this directory; UserError if it cannot be read."""
    try:
        return configuration.load(directory / "config.yaml")
    except UserError as error:
        raise UserError(
            f"run.dir={directory} already holds a run, whose config.yaml cannot be read ({error}); "
            "choose another directory, or set run.overwrite=true to replace it"
        ) from error


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Settings that differ, as `name=before, now after`: those that may not, those that round."""
    forbidden, rounding = [], []
    for section in dataclasses.fields(Config):
        old, new = (_settings(getattr(config, section.name)) for config in (before, now))
        for key in sorted(old.keys() | new.keys()):
            name = f"{section.name}.{key}"
            if old.get(key) != new.get(key) and not {name, section.name} & set(FREE):
                found = rounding if {name, section.name} & set(ROUNDING) else forbidden
                found.append(f"{name}={old.get(key)}, now {new.get(key)}")
    return forbidden, rounding


def _settings(section) -> dict:
    return dataclasses.asdict(section) if dataclasses.is_dataclass(section) else section
