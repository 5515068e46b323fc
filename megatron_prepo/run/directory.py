"""A run's directory: its owner, the files that a run writes, and whether a run starts or resumes.

A run marks its directory (`ownership.py`) before it writes anything else to it, and takes the
directory's lock (`lock.py`).  Nothing is removed but files that a run wrote to a directory that it
marked, and only by `run.overwrite=true`, or if that run completed no step.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from megatron_prepo import config as configuration
from megatron_prepo.config import (
    Config,
    RunConfig,
    TrainConfig,
    to_tree,
    to_yaml,
    yaml_text,
)
from megatron_prepo.errors import UserError
from megatron_prepo.files import lock, ownership
from megatron_prepo.files.atomic import write_text
from megatron_prepo.inputs import digests as inputs
from megatron_prepo.inputs import hub
from megatron_prepo.run import changes

RUN_FILES = (
    "config.yaml",
    "inputs.json",
    "prompts.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "first_evaluation.json",
    "ledger.jsonl",
    "summary.json",
    "summary_step_*.json",
    "pass_rate.png",
)
"""Files that a run writes."""


@dataclass(frozen=True)
class Folder:
    """Patterns of the names that a run writes to a folder.

    `{identity}` in a pattern stands for the run's identity.
    """

    files: tuple[str, ...] = ()
    marked: tuple[str, ...] = ()
    """Folders that have a marker of `kind`."""
    kind: str = ""
    whole: tuple[str, ...] = ()
    """Folders and links that another program writes for this run alone."""


FOLDERS = {
    "checkpoints": Folder(
        files=("latest_checkpointed_iteration.txt", "best.json"),
        marked=("iter_*",),
        kind="checkpoint",
    ),
    "dumps": Folder(marked=("step_*",), kind="dump"),
    "journal": Folder(files=("*_*.*.jsonl",)),
    "texts": Folder(files=("rollouts.jsonl", "evaluations.jsonl")),
    "tensorboard": Folder(files=("events.out.tfevents.*.{identity}",)),
    "wandb": Folder(
        files=("run_id", "settings", "wandb-resume.json"),
        whole=("run-*", "offline-run-*", "latest-run", "debug*.log"),
    ),
    "mlflow": Folder(whole=("{identity}",)),
    "swanlab": Folder(whole=("{identity}",)),
    "trackio": Folder(whole=("{identity}",)),
    "profile": Folder(files=("step_*_rank_*.json.gz",)),
}
"""Folders to which a run writes."""

MARKED = {
    "hf": "model",
    "hf.partial": ownership.UNFINISHED,
    "adapter": "adapter",
    "adapter.partial": ownership.UNFINISHED,
    "weight_sync": "weights for servers",
    "weight_sync.partial": ownership.UNFINISHED,
}
"""Folders that have a marker themselves, with its kind."""

LOGS = ("rank_*.log", "rank_*.error", "reward.log")
"""Files of `logs/` that are replaced at every start; `run.overwrite` keeps them."""

SAVED_BY_ALL_VERSIONS = (
    "run.overwrite",
    "model.megatron",
    "selection.horizon",
    "weighting.clamp",
    "rollout.temperature",
    "advantage.eps",
    "optimizer.adam_eps",
    "train.rollout_budget",
    "train.seed",
)
"""Settings with defaults: a configuration that a run saved has all of them, a user's hardly."""


def check(config: Config) -> Literal["new", "unfinished"]:
    """Return whether this run would start or resume; nothing is written.

    Raises UserError if the directory is in use, holds files that are not ours, a run with other
    settings or a finished run, or if an input is among the files that would be removed.
    """
    directory = Path(config.run.dir)
    if os.path.lexists(directory) and not directory.is_dir():
        raise UserError(f"run.dir={directory} is a file; choose a directory")
    _check_writable(directory)
    lock.refuse_if_held(directory / lock.FILE, f"run.dir={directory}")
    if not ours(directory):
        _refuse_unmarked_files(directory, overwrite=config.run.overwrite)
    if not (directory / "config.yaml").exists():
        _refuse_the_models_folder(config.run.dir, config.model.hf)
    if config.run.overwrite:
        to_remove(config)
        return "new"
    if not (directory / "config.yaml").exists():
        _refuse_a_run_without_its_config(directory)
        return "new"
    if _is_replaced_without_a_step(config):
        to_remove(config)
        return "new"
    before = saved_config(directory)
    now = changes.resumed(before, config)
    found = _changes(before, now)
    if found.forbidden:
        raise UserError(
            f"run.dir={directory} holds a run with other settings: "
            f"{'; '.join(found.forbidden)}; resume it with its own settings "
            f"(megatron-prepo resume {directory}), or choose another run.dir for these "
            "(run.overwrite=true deletes the existing run)"
        )
    _check_length(directory, now.train)
    return "unfinished"


def as_started(config: Config) -> Config:
    """Return the configuration with `run.overwrite=true` if it replaces a run that made no step."""
    if config.run.overwrite or not _is_replaced_without_a_step(config):
        return config
    return dataclasses.replace(config, run=dataclasses.replace(config.run, overwrite=True))


def _is_replaced_without_a_step(config: Config) -> bool:
    """Return whether the directory holds a run that made no step, and these settings cannot resume.

    Such a run may have failed because of what its saved settings or inputs are.
    """
    directory = Path(config.run.dir)
    if not (directory / "config.yaml").exists() or not ours(directory):
        return False
    if has_made_a_step(directory):
        return False
    try:
        before = saved_config(directory)
        found = _changes(before, changes.resumed(before, config))
    except UserError:
        return True
    return bool(found.forbidden)


def begin(config: Config, log: Callable[[str], None]) -> Config:
    """Take the directory's lock and prepare it; this process holds the lock until `end`."""
    directory = Path(config.run.dir)
    _check_writable(directory)
    # before the lock's file is written: a folder that is not ours stays as it is
    check(config)
    directory.mkdir(parents=True, exist_ok=True)
    lock.take(directory / lock.FILE, f"run.dir={directory}")
    try:
        return prepare(config, log)
    except BaseException:
        end(directory)
        raise


def end(directory: Path) -> None:
    """Release the lock."""
    lock.give_back(directory / lock.FILE)


def prepare(config: Config, log: Callable[[str], None]) -> Config:
    """Clear the directory for a new run or keep it for a resumed one; return the run's settings.

    The caller holds the lock.  Everything that is removed is logged.
    """
    directory, state = Path(config.run.dir), check(config)
    directory.mkdir(parents=True, exist_ok=True)
    if state == "new":
        read = inputs.digests(config)
        clear(config, log)
        ownership.mark(directory, ownership.RUN, identity=ownership.new_identity())
    else:
        before = saved_config(directory)
        config = changes.resumed(before, config)
        needed = needs_initial_weights(config)
        read = changes.resumed_digests(
            before, config, saved_inputs(directory), initial_weights=needed
        )
        changes.log_changes(_changes(before, config), config, before.train.total_steps, log)
        if not ours(directory):
            kept = _identity_of_checkpoints(directory)
            ownership.mark(directory, ownership.RUN, identity=kept or ownership.new_identity())
        if (directory / "summary.json").exists():
            _withdraw_summary(directory, log)
    write_text(directory / "inputs.json", json.dumps(read, indent=1) + "\n")
    write_text(directory / "config.yaml", to_yaml(with_absolute_paths(config)))
    return config


def needs_initial_weights(config: Config) -> bool:
    """Whether the run needs the weights of `model.megatron` or `model.hf` that it starts from.

    A run that resumes from a checkpoint of its own does not, unless they are the reference of
    `loss.kl_coef`, or its adapters (`lora.rank`) are exported for them.  Only the sizes of a
    checkpoint's files are compared: other damage is found when it is read, and
    `check_initial_weights` is then called before the run starts from the beginning.
    """
    from megatron_prepo.actor import checkpoint, manifest

    directory = Path(config.run.dir)
    if config.run.overwrite or not (directory / "config.yaml").is_file():
        return True
    if config.loss.kl_coef or config.lora.rank:
        return True
    own = identity(directory)
    return not any(
        manifest.is_complete(path)
        and (path / checkpoint.RUN_STATE).is_file()
        and (own is None or _identity_of_checkpoint(path) in (None, own))
        for path in checkpoint.by_step(directory / "checkpoints").values()
    )


def check_initial_weights(config: Config) -> None:
    """UserError unless the weights that the run in `run.dir` started from are unchanged."""
    directory = Path(config.run.dir)
    before, read_before = saved_config(directory), saved_inputs(directory)
    different, _ = changes.compare_inputs(before, config, read_before, initial_weights=True)
    if different:
        raise UserError(
            f"no checkpoint in {directory / 'checkpoints'} can be resumed from, and the run "
            f"cannot start from the beginning: {'; '.join(different)}"
        )


def is_finished(config: Config) -> bool:
    """Return whether the directory holds a finished run that these settings do not extend."""
    directory = Path(config.run.dir)
    if config.run.overwrite or not (directory / "summary.json").is_file():
        return False
    return not _is_longer(directory, changes.resumed(saved_config(directory), config).train)


def check_resumable(directory: Path) -> None:
    """Raise UserError unless the directory holds a run."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} holds no run: there is no config.yaml")
    if not ours(directory) and not _is_of_an_older_version(directory):
        raise UserError(
            f"{directory} holds no run: its config.yaml was not saved by a run, which also leaves "
            f"a {ownership.MARKER} or a ledger"
        )


# Ownership


def ours(directory: Path) -> bool:
    """Return whether a run has marked the directory."""
    content = ownership.marker(directory)
    return content is not None and content["kind"] == ownership.RUN


def identity(directory: Path) -> str | None:
    """Return the identity of the run that has marked the directory; None without one."""
    content = ownership.marker(directory)
    if content is None or content["kind"] != ownership.RUN:
        return None
    return str(content["identity"])


def lost(directory: Path, of: str) -> str | None:
    """Return an error message if the directory is no longer that of the run with this identity.

    For the process that holds its lock: a directory may be moved, removed or replaced during the
    run, and another run may have begun in its place.  Raises OSError if the check itself fails.
    """
    if not os.path.lexists(directory):
        what = "was moved or removed"
    elif not lock.is_held(directory / lock.FILE):
        what = f"was replaced by another directory, or its {lock.FILE} was removed or replaced"
    elif _read_identity(directory) != of:
        what = f"has lost its {ownership.MARKER}, or has another run's"
    else:
        return None
    return (
        f"run.dir={directory} {what} while the run was using it; the run has stopped, and has "
        "written nothing there since it noticed: put its directory back and start the same "
        "command, or resume it where it is now (megatron-prepo resume PLACE)"
    )


def entries(directory: Path) -> list[Path]:
    """Return the contents of a directory that have a name to which a run writes."""
    names = [p for p in sorted(directory.glob("*")) if any(fnmatch(p.name, n) for n in RUN_FILES)]
    folders = (directory / name for name in (*FOLDERS, *MARKED))
    return names + [path for path in folders if os.path.lexists(path)]


def to_remove(config: Config) -> list[Path]:
    """Return what `clear` would remove; UserError if that includes other files or an input."""
    directory = Path(config.run.dir)
    if not ours(directory):
        return []
    found = entries(directory)
    strangers = [path for entry in found for path in _strangers(entry)]
    if strangers:
        raise UserError(
            f"run.dir={directory} cannot be cleared, since {_named(strangers, directory)} in it "
            "is not known to be this run's; nothing was removed: move it away, or choose another "
            "run.dir"
        )
    for read in inputs.list_inputs(config):
        for entry in found:
            if _touch(read.path, entry):
                raise UserError(
                    f"{read.setting}={read.path} is in the way: {entry} would be removed for the "
                    f"new run in run.dir={directory}; nothing was removed: choose another run.dir, "
                    "or move the input"
                )
    return found


def check_config_file(run: RunConfig, file: str | Path) -> None:
    """Raise UserError if `run.overwrite` would remove the configuration's own file."""
    directory = Path(run.dir)
    names = (*RUN_FILES, *FOLDERS, *MARKED)
    if run.overwrite and any(_touch(Path(file), directory / name) for name in names):
        raise UserError(
            f"the configuration {file} is in run.dir={directory}, which run.overwrite=true clears; "
            "copy it to another place, or choose another run.dir"
        )


def clear(config: Config, log: Callable[[str], None]) -> None:
    """Remove the files that a run wrote to its directory; nothing if it is not marked."""
    found = to_remove(config)
    if found:
        log(f"removed from {config.run.dir}: {', '.join(path.name for path in found)}")
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _strangers(entry: Path) -> list[Path]:
    """Return the paths in one of the `entries` that the run did not write."""
    if entry.is_symlink():
        return [entry]
    run = identity(entry.parent)
    if entry.name in MARKED:
        return ownership.strangers(entry, MARKED[entry.name], run)
    if entry.name not in FOLDERS:
        return [] if entry.is_file() else [entry]
    if not entry.is_dir():
        return [entry]
    folder, found = FOLDERS[entry.name], []
    for path in sorted(entry.iterdir()):

        def matches_any(patterns: tuple[str, ...], name: str = path.name) -> bool:
            return any(fnmatch(name, pattern.format(identity=run)) for pattern in patterns)

        if matches_any(folder.whole) and (
            path.name == run or (entry.name == "wandb" and _is_of_our_wandb_run(path))
        ):
            found += _links_to_elsewhere(path, entry)
            continue
        if matches_any(folder.marked):
            kind = ownership.UNFINISHED if path.suffix == ".partial" else folder.kind
            found += ownership.strangers(path, kind, run)
        elif path.is_symlink() or not path.is_file() or not matches_any(folder.files):
            found.append(path)
    return found


def _is_of_our_wandb_run(path: Path) -> bool:
    """Return whether W&B wrote the path for this run.

    Names of its folders end with the run's id; everything else is a link.  A notebook that logs
    from within the directory writes folders with other ids.
    """
    if path.is_symlink():
        return True
    own = path.parent / "run_id"
    return path.is_dir() and own.is_file() and path.name.endswith(f"-{own.read_text().strip()}")


def _links_to_elsewhere(path: Path, folder: Path) -> list[Path]:
    """Return the links at and below a path that lead out of the folder, as no dashboard's do."""
    walk = os.walk(path) if not path.is_symlink() else ()
    below = (Path(at, name) for at, names, files in walk for name in (*names, *files))
    links = (one for one in (path, *below) if one.is_symlink())
    return [link for link in links if folder.resolve() not in link.resolve().parents]


def _touch(one: Path, other: Path) -> bool:
    """Return whether one path is the other or contains it, by name or through links."""
    pairs = ((inputs.absolute(one), inputs.absolute(other)), (one.resolve(), other.resolve()))
    return any(a == b or a in b.parents or b in a.parents for a, b in pairs)


def _named(paths: list[Path], directory: Path) -> str:
    """Name the first three paths, relative to the directory."""
    names = [str(path.relative_to(directory)) for path in paths[:3]]
    return ", ".join(names) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _refuse_unmarked_files(directory: Path, *, overwrite: bool) -> None:
    """Raise UserError if an unmarked directory has files with names to which a run writes."""
    if content := ownership.marker(directory):
        raise UserError(
            f"run.dir={directory} holds a {content['kind']} that this program wrote, and no run; "
            "choose another directory"
        )
    logs = [p for pattern in LOGS for p in sorted((directory / "logs").glob(pattern))]
    found = entries(directory) + logs
    if not found:
        return
    if _is_of_an_older_version(directory):
        if not overwrite:
            return
        raise UserError(
            f"run.dir={directory} holds a run of an older version, which has no {ownership.MARKER} "
            "to tell what is the run's from what is yours; nothing was removed: resume it once, "
            f"remove {_named(found, directory)} yourself, or choose another run.dir"
        )
    raise UserError(
        f"run.dir={directory} has no {ownership.MARKER}, so {_named(found, directory)} in it is "
        "not known to be a run's; nothing was removed: choose another run.dir, or move these away"
    )


def _refuse_a_run_without_its_config(directory: Path) -> None:
    """Raise UserError if the directory holds files of a run, but not its configuration."""
    if found := entries(directory):
        raise UserError(
            f"run.dir={directory} holds a run whose config.yaml is gone, with "
            f"{_named(found, directory)}; nothing was removed: restore config.yaml, or choose "
            "another run.dir (run.overwrite=true deletes the run's remaining files)"
        )


def _refuse_the_models_folder(run_dir: str, hf: str) -> None:
    """Raise UserError for a new run in `model.hf`, whose other files are copied on export."""
    directory, model = Path(run_dir).resolve(), Path(hf).resolve()
    if model == directory or model in directory.parents:
        raise UserError(
            f"run.dir={run_dir} is in the model's folder, model.hf={hf}, whose "
            "files are copied to the exported model; choose another run.dir"
        )


def _is_of_an_older_version(directory: Path) -> bool:
    """Return whether a directory without a marker holds a run of an older version.

    Its config.yaml then has all settings, and ledger, metrics and evaluations have our format.
    """
    try:
        config = directory / "config.yaml"
        configuration.load(config)
        tree = yaml_text.read(config.read_text(encoding="utf-8"), str(config))
        names = (name.split(".") for name in SAVED_BY_ALL_VERSIONS)
        return all(key in tree[section] for section, key in names) and all(
            _first_line(directory / name, key)
            for name, key in (
                ("ledger.jsonl", "prompt_id"),
                ("metrics.jsonl", "step"),
                ("evaluations.jsonl", "pass_rate"),
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return False


def _first_line(path: Path, key: str) -> bool:
    """Return whether a file of JSON lines is empty or its first object has this key."""
    with open(path, "rb") as lines:
        line = lines.readline(1 << 20)
    return not line.endswith(b"\n") or key in json.loads(line)


def _identity_of_checkpoints(directory: Path) -> str | None:
    """Return the identity that the checkpoints of a run without a marker share; None without one.

    `cp -r run/* copy` does not copy the marker.  Raises UserError if they are of several runs.
    """
    states = (directory / "checkpoints").glob("iter_*/run.json")
    found = {_identity_of_checkpoint(state.parent) for state in states}
    if len(found) > 1:
        raise UserError(
            f"run.dir={directory} has no {ownership.MARKER}, and its checkpoints are of "
            f"{len(found)} runs: restore the marker, or move the other runs' checkpoints away"
        )
    return found.pop() if found else None


def _identity_of_checkpoint(path: Path) -> str | None:
    """Return the identity of the run that wrote a checkpoint; None if it is damaged or names none.

    Older versions named none.
    """
    try:
        state = json.loads((path / "run.json").read_text(encoding="utf-8"))
        found: str | None = state["run"].get("identity")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_writable(directory: Path) -> None:
    """Raise UserError if a run could not write to the directory; nothing is written."""
    place = directory
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"run.dir={directory} is below {place}, which is a file; choose another")
    folders = (directory / name for name in (*FOLDERS, *MARKED))
    for folder in (place, *folders):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"run.dir={directory} cannot be written, since {folder} is read-only for this "
                "user; choose another directory, or change its permissions"
            )


def _read_identity(directory: Path) -> str | None:
    """Return `identity`, but raise OSError if the marker exists and cannot be read."""
    with suppress(FileNotFoundError):
        (directory / ownership.MARKER).read_bytes()
    return identity(directory)


# What a run saved


def saved_config(directory: Path) -> Config:
    """Return the configuration of the run in this directory; UserError if it cannot be read."""
    try:
        return configuration.load(directory / "config.yaml")
    except UserError as error:
        raise UserError(
            f"run.dir={directory} holds a run whose config.yaml cannot be read ({error}); "
            "restore it, or choose another run.dir (run.overwrite=true deletes the run)"
        ) from error


def saved_inputs(directory: Path) -> changes.Digests | None:
    """Return the digests of the inputs when the run began; None for a run of an older version."""
    path = directory / "inputs.json"
    if not path.is_file():
        return None
    try:
        saved: changes.Digests = json.loads(path.read_text(encoding="utf-8"))
        assert all({"path", "files"} <= entry.keys() for entry in saved.values())
        return saved
    except (OSError, ValueError, AttributeError, TypeError, AssertionError) as error:
        raise UserError(
            f"{path} is damaged; restore it, or remove it: the inputs are then compared by their "
            "paths only"
        ) from error


def _changes(before: Config, now: Config) -> changes.Changes:
    """Return how a resumed run's settings and inputs differ from the saved ones."""
    needed = needs_initial_weights(now)
    read_before = saved_inputs(Path(now.run.dir))
    return changes.compare(before, now, read_before, initial_weights=needed)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths, as saved: valid from any working directory."""
    tree = to_tree(config)
    for section, key in (
        ("run", "dir"),
        ("model", "hf"),
        ("model", "megatron"),
        ("data", "train"),
        ("data", "eval"),
        ("data", "few_shot"),
        ("weight_sync", "directory"),
    ):
        if tree[section][key] is not None:
            tree[section][key] = configuration.with_paths(tree[section][key], hub.lasting)
    for section, key in (name.split(".") for name in changes.USER_CODE):
        file, colon, name = tree[section][key].rpartition(":")
        if colon:
            tree[section][key] = f"{inputs.absolute(file)}:{name}"
    python = config.servers.python or ""
    if "/" in python:
        tree["servers"]["python"] = str(inputs.absolute(python))
    return configuration.from_tree(tree)


def _check_length(directory: Path, train: TrainConfig) -> None:
    """Raise UserError if no work remains, or if the run has more steps than the settings allow."""
    made = _num_lines(directory / "metrics.jsonl")
    if made > train.total_steps:
        raise UserError(
            f"train.total_steps={train.total_steps}, and the run in run.dir={directory} has "
            f"completed {made} steps; set train.total_steps={made} or more"
        )
    if not (directory / "summary.json").exists():
        return
    if not _is_longer(directory, train):
        budget = " and train.rollout_budget" if train.rollout_budget is not None else ""
        raise UserError(
            f"run.dir={directory} holds a finished run of {made} steps; extend it by a larger "
            f"train.total_steps{budget}, or choose another run.dir for a new run "
            "(run.overwrite=true deletes the existing run)"
        )
    if not list((directory / "checkpoints").glob("iter_*/run.json")):
        raise UserError(
            f"the finished run in run.dir={directory} cannot be extended: it has no checkpoint "
            "with the optimizer's state (checkpoint.optimizer=false); start a new run from its "
            "weights in another run.dir (model.megatron)"
        )


def _is_longer(directory: Path, train: TrainConfig) -> bool:
    """Return whether these settings extend the finished run."""
    path = directory / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        steps, rollouts = summary["steps"], summary["rollouts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: it is not a run's summary") from error
    budget = train.rollout_budget
    return steps < train.total_steps and (budget is None or rollouts < budget)


def _withdraw_summary(directory: Path, log: Callable[[str], None]) -> None:
    """Rename the summary of a finished run that is extended, so that it counts as unfinished."""
    path = directory / "summary.json"
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
    kept = directory / f"summary_step_{steps}.json"
    path.replace(kept)
    log(
        f"the finished run is extended: its summary is now {kept.name}; hf/ and pass_rate.png are "
        "replaced at the new end"
    )


def has_made_a_step(directory: Path) -> bool:
    """Return whether the run has a completed step or a checkpoint, which resuming would keep."""
    checkpoints = (directory / "checkpoints").glob("iter_*")
    return _num_lines(directory / "metrics.jsonl") > 0 or any(True for _ in checkpoints)


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0
