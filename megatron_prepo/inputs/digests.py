"""Digests of a run's inputs, saved with the run and compared on resume.

A path may change if the content stays the same; that of a model or data set on the hub is its name
and commit (`hub.py`).  `inputs.json` holds, for each setting that names
an input, its path and a digest of each of its files (`files/digest.py`).

In a model's folder only files that can affect numbers are compared: configuration, tokenizer,
weights.  Of a reward function or a selector only its own file is compared, not the modules that it
imports.
"""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_prepo.config import Config
from megatron_prepo.files import rows
from megatron_prepo.files.digest import digest
from megatron_prepo.inputs.hub import lasting

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*token*",
    "vocab*",
    "merges.txt",
    "*chat_template*",
    "*.model",
    "*.safetensors",
    "*.safetensors.index.json",
    # of a Megatron checkpoint
    "*.distcp",
    ".metadata",
    "metadata.json",
    "common.pt",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
"""Names of the files of `model.hf` that hold weights, and of their index."""
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Input:
    """A setting that names a file or folder to read."""

    setting: str
    path: Path
    """Absolute; links are not resolved."""


def list_inputs(config: Config) -> list[Input]:
    """Return the inputs that the configuration names."""
    named = {
        "model.hf": config.model.hf,
        "model.megatron": config.model.megatron,
        "data.train": config.data.train,
        **config.data.eval_settings,
        "data.few_shot": config.data.few_shot,
        "selection.method": config.selection.method.rpartition(":")[0],
        "reward.function": config.reward.function.rpartition(":")[0],
        "servers.python": config.servers.python if "/" in (config.servers.python or "") else None,
    }
    return [Input(setting, absolute(path)) for setting, path in named.items() if path]


COMPARED = (
    "model.hf",
    "model.megatron",
    "data.train",
    "data.eval",
    "data.few_shot",
    "selection.method",
    "reward.function",
)
"""Inputs that affect numbers; `data.eval` stands for `data.eval.NAME`, too."""


def absolute(path: str | Path) -> Path:
    """Return an absolute path, by the working directory; links are not resolved."""
    return Path(os.path.abspath(path))


def digests(config: Config, without_weights: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Return `path` and `files` of each compared input: digests by name, none if it is missing.

    `model.megatron` also has `checkpoint`: the one that a run would start from.  Weights of the
    settings in `without_weights` are not opened.
    """
    found: dict[str, dict[str, Any]] = {}
    for read in list_inputs(config):
        if ".".join(read.setting.split(".")[:2]) not in COMPARED:
            continue
        weights = read.setting not in without_weights
        files = file_digests(read.setting, read.path, weights=weights)
        found[read.setting] = {"path": lasting(read.path), "files": files}
        if read.setting == "model.megatron" and weights:
            found[read.setting]["checkpoint"] = str(_checkpoint(read.path))
    return found


def file_digests(setting: str, path: Path, *, weights: bool = True) -> dict[str, str]:
    """Return the digests of an input's files that affect numbers, by name.

    Without `weights`, files of weights are skipped.
    """
    if path.is_file():
        return {"content": digest(path)}
    if setting.startswith("data."):
        found = rows.data_files(path) if rows.exists(path) else []
        folder = os.path.commonpath([file.parent for file in found]) if found else ""
        return {os.path.relpath(file, folder): digest(file) for file in found}
    if setting == "model.megatron":
        if not weights:
            return {}  # nothing else of it is read
        path = _checkpoint(path)
    names = {
        file.name
        for file in path.glob("*")
        if any(fnmatch(file.name, pattern) for pattern in MODEL_FILES)
    }
    names |= {f"{TEMPLATES}/{file.name}" for file in (path / TEMPLATES).glob("*")}
    names |= _in_index(path / "model.safetensors.index.json")
    if not weights:
        names = {name for name in names if not is_weights(name)}
    return {name: digest(path / name) for name in sorted(names) if (path / name).is_file()}


def is_weights(name: str) -> bool:
    """Whether a file of `model.hf` holds weights, or is their index."""
    return any(fnmatch(name, pattern) for pattern in WEIGHT_FILES)


def _in_index(file: Path) -> set[str]:
    """Return the weight files that an index names, including those in subfolders."""
    try:
        return set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()  # missing, or invalid and reported by preflight


def _checkpoint(path: Path) -> Path:
    """Return the checkpoint that a run would start from; later ones may follow in the folder."""
    from megatron_prepo.actor.checkpoint import newest
    from megatron_prepo.errors import UserError

    try:
        return newest(path)
    except UserError:  # reported by preflight
        return path


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the names of an input's files that differ."""
    names = sorted(before["files"].keys() | now["files"].keys())
    return [name for name in names if before["files"].get(name) != now["files"].get(name)]
