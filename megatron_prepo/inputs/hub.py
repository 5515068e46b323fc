"""Models and data sets on the Hugging Face hub, in place of local ones.

A setting names one by its id, `Qwen/Qwen2.5-0.5B`, at a revision by `Qwen/Qwen2.5-0.5B@REVISION`,
or in the hub's own notation, which also names files of a data set:
`hf://datasets/openai/gsm8k@main/main/train-*.parquet`.  What exists here under the name comes
first.

Its files are downloaded to the cache of `huggingface_hub`, from the server of `HF_ENDPOINT`, and
the rest of the program sees that folder.  A run saves `hf://NAME@COMMIT`, and uses this commit when
it resumes.
"""

import os
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

import httpx

from megatron_prepo.config import (
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    from_tree,
    literal,
    load,
    to_tree,
)
from megatron_prepo.errors import UserError, one_line
from megatron_prepo.files import ownership, rows

Kind = Literal["model", "dataset"]
Result = TypeVar("Result")

PREFIX = "hf://"
ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^/@]+))?")
URL = re.compile(rf"{PREFIX}(?:datasets/)?(?!datasets/){ID.pattern}(?:/(?P<path>.+?))?/?")
SNAPSHOT = re.compile(
    r".*/(?P<kind>model|dataset)s--(?P<owner>[\w.-]+)--(?P<name>[\w.-]+)"
    r"/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<path>.+))?"
)
"""A folder of the cache, or a place in it."""
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite")
"""Files of a model that no command reads."""
WEIGHTS = ("*.safetensors",)
INSTALL = 'pip install -e ".[data]"'


class Name(NamedTuple):
    """The name of a repository on the hub."""

    kind: Kind
    repo: str
    revision: str | None
    path: str | None
    """Files of a data set: a file, a folder, or a path with *."""

    @classmethod
    def of(cls, place: str, kind: Kind) -> "Name | None":
        """Parse a name; None for a local place."""
        if place.startswith(PREFIX):
            match = URL.fullmatch(place)
            if match is None:
                raise UserError(
                    f"{place} is no name on the hub, such as hf://OWNER/MODEL@REVISION, or "
                    "hf://datasets/OWNER/DATA@REVISION/FILES"
                )
        else:
            match = None if place.endswith(rows.SUFFIXES) else ID.fullmatch(place)
        if match is None or os.path.lexists(place):
            return None
        revision = match["revision"] and unquote(match["revision"])
        return cls(kind, match["repo"], revision, match.groupdict().get("path"))


def resolved(config: Config, *, weights: bool = True) -> Config:
    """Return the configuration with local places instead of names on the hub; downloads the files.

    Without `weights`, files of weights are not downloaded.  A name without a revision is at the
    commit that the run in `run.dir` has for this setting, if it has one, else at the newest.
    Raises UserError that names the setting.
    """
    found_names = names(config.model, config.data)
    if not found_names:
        return config
    tree, before = to_tree(config), _recorded(config.run)
    for setting, name in found_names.items():
        section, key, *of_set = setting.split(".")
        found = str(_fetched(_as_recorded(name, before.get(setting)), setting, weights=weights))
        if of_set:
            tree[section][key][of_set[0]] = found
        else:
            tree[section][key] = found
    return from_tree(tree)


def names(model: ModelConfig, data: DataConfig) -> dict[str, Name]:
    """Return the names on the hub, by setting."""
    prompts = {"data.train": data.train, **data.eval_settings}
    kinds: dict[str, tuple[str, Kind]] = {"model.hf": (model.hf, "model")}
    kinds |= {setting: (place, "dataset") for setting, place in prompts.items()}
    found = {setting: Name.of(*given) for setting, given in kinds.items()}
    return {setting: name for setting, name in found.items() if name}


def pins(config: Config) -> list[str]:
    """Return overrides that give each name on the hub its present commit; downloads the files."""
    tree, settings = to_tree(resolved(config)), names(config.model, config.data)
    return [f"{setting}={literal(lasting(_value(tree, setting)))}" for setting in settings]


def model(place: str | Path) -> Path:
    """Return the folder of a model, which is downloaded if the place is a name on the hub."""
    name = Name.of(str(place), "model")
    return _fetched(name, "model") if name else Path(place)


def data(place: str | Path) -> str:
    """Return the place of prompts, which are downloaded if the place is a name on the hub."""
    name = Name.of(str(place), "dataset")
    return str(_fetched(name, "prompts")) if name else str(place)


def lasting(place: str | Path) -> str:
    """Return a name of a place that holds in any working directory, and if possible anywhere.

    >>> lasting("/cache/models--Qwen--Qwen3-4B/snapshots/" + "ab" * 20)
    'hf://Qwen/Qwen3-4B@abababababababababababababababababababab'
    """
    if str(place).startswith(PREFIX):
        return str(place)
    path = os.path.abspath(place)
    match = SNAPSHOT.fullmatch(path)
    if match is None:
        return path
    folder = "datasets/" if match["kind"] == "dataset" else ""
    inside = f"/{match['path']}" if match["path"] else ""
    return f"{PREFIX}{folder}{match['owner']}/{match['name']}@{match['commit']}{inside}"


def for_other_programs(place: str | Path) -> tuple[str, str | None]:
    """Return a local model's absolute path and None, or its name on the hub and its commit.

    >>> for_other_programs("/cache/models--Qwen--Qwen3-4B/snapshots/" + "ab" * 20)
    ('Qwen/Qwen3-4B', 'abababababababababababababababababababab')
    """
    path = lasting(place)
    name = Name.of(path, "model")
    return (name.repo, name.revision) if name else (path, None)


def prepare(repo: str, *, private: bool = False) -> None:
    """Create a repository of a model, unless it exists, and check that `upload` may write to it.

    Without `private`, a new one is as its owner has set.  Raises UserError if the hub refuses, or
    if `private` is asked for and everyone can read the existing repository.
    """
    if not ID.fullmatch(repo) or "@" in repo:
        raise UserError(f"--push {repo} must have the form OWNER/NAME")
    hub, what = _library(), f"--push {repo}"
    api = hub.HfApi()
    _asked(lambda: api.create_repo(repo, private=private or None, exist_ok=True), what)
    if private and not _asked(lambda: api.repo_info(repo), what).private:
        raise UserError(
            f"{what} --private: the repository exists and everyone can read it; change that at "
            f"{hub.constants.ENDPOINT}/{repo}/settings, choose another name, or remove --private"
        )
    _asked(lambda: api.auth_check(repo, write=True), what)


def upload(directory: str | Path, repo: str) -> str:
    """Upload a model's folder to its repository and return the address of the commit.

    Raises UserError with the command that uploads what is missing, if the upload fails.
    """
    excluded = [word for name in ownership.NOT_CONTENT for word in ("--exclude", name)]
    again = shlex.join(["hf", "upload", repo, str(directory), ".", *excluded])
    upload_folder = partial(
        _library().HfApi().upload_folder,
        repo_id=repo,
        folder_path=str(directory),
        ignore_patterns=list(ownership.NOT_CONTENT),
        commit_message="Upload model",
    )
    what = f"--push {repo} ({directory} is complete; `{again}` resumes the upload)"
    return str(_asked(upload_folder, what).commit_url)


def _fetched(name: Name, setting: str, *, weights: bool = True) -> Path:
    """Return the local place of a name's files, downloaded unless they are in the cache."""
    hub = _library()
    if name.kind == "model":
        patterns: dict[str, Any] = {
            "ignore_patterns": [*OTHER_WEIGHTS, *(() if weights else WEIGHTS)]
        }
    elif name.path:
        patterns = {"allow_patterns": [name.path, f"{name.path}/*"]}
    else:
        patterns = {"allow_patterns": [f"*{suffix}" for suffix in rows.SUFFIXES]}
    fetch = partial(
        hub.snapshot_download, name.repo, repo_type=name.kind, revision=name.revision, **patterns
    )
    what = f"no such file or folder: {setting}={name.repo}; asked for this {name.kind}"
    folder = Path(_asked(fetch, what))
    place = folder / name.path if name.path else folder
    if name.kind == "dataset":
        _check_files(place, folder, name)
    return place


def _check_files(place: Path, folder: Path, name: Name) -> None:
    """Raise UserError, in terms of the hub, unless the place has files of one split."""
    try:
        if not rows.exists(place):
            raise UserError(f"{place} has no such files")
        rows.data_files(place)
    except UserError as error:
        words = str(error).replace(str(folder), f"{PREFIX}datasets/{name.repo}")
        raise UserError(words) from None


def _asked(call: Callable[[], Result], what: str) -> Result:
    """Return the hub's answer to a call; UserError that begins with `what` if it has none."""
    hub = _library()
    endpoint = hub.constants.ENDPOINT
    try:
        return call()
    except hub.errors.RevisionNotFoundError as error:
        raise UserError(f"{what}: {endpoint} does not have this revision of it") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: {endpoint} does not have it, or not for you (`hf auth login`)"
        ) from error
    except hub.errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        remedy = "; log in with a token that may do this (`hf auth login`)" if refused else ""
        raise UserError(f"{what}: {endpoint}: {one_line(error)}{remedy}") from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise UserError(f"{what}: {endpoint}: {one_line(error.__cause__ or error)}") from error


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(f"the hub needs huggingface_hub: {INSTALL}") from error
    return huggingface_hub


def _recorded(run: RunConfig) -> dict[str, Name]:
    """Return the names, with commits, that the run in `run.dir` uses, by setting."""
    file = Path(run.dir) / "config.yaml"
    if run.overwrite or not file.is_file():
        return {}
    saved = load(file)
    return names(saved.model, saved.data)


def _as_recorded(name: Name, before: Name | None) -> Name:
    """Return a name without a revision at that of the run before, if it is of the same repository.

    Each setting has its own, since two of them may name a repository at two revisions.
    """
    if name.revision or before is None or (name.kind, name.repo) != (before.kind, before.repo):
        return name
    return name._replace(revision=before.revision)


def _value(tree: dict[str, Any], setting: str) -> str:
    value: Any = tree
    for key in setting.split("."):
        value = value[key]
    return str(value)
