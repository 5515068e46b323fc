"""`megatron-prepo evaluate`: evaluate models on suites of problems with either engine; resumable.

| in the directory | contents |
|---|---|
| `evaluation.json` | settings, models and suites; a later start must agree with them |
| `completions/MODEL/SUITE.jsonl` | one object per completion, appended as they are graded |
| `exported/MODEL/` | a Megatron checkpoint in Hugging Face format |
| `results.json`, `table.md` | avg@k and pass@k with intervals; the table in the paper's form |

Megatron is loaded only to export a checkpoint of its format.  A completion equals that of an
evaluation during training with the same seed, weights and engine.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from megatron_prepo import config as configuration
from megatron_prepo.config import Config, DataConfig, ModelConfig, overridden
from megatron_prepo.data import read_prompts
from megatron_prepo.errors import UserError
from megatron_prepo.evaluation import table
from megatron_prepo.evaluation.completions import Completions
from megatron_prepo.evaluation.held_out import evaluation_request
from megatron_prepo.evaluation.pass_at_k import mean_with_ci95
from megatron_prepo.files import lock, rows
from megatron_prepo.files.atomic import write_text
from megatron_prepo.inputs import digests as inputs
from megatron_prepo.inputs import preflight, prompt_digests
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.hf_files import HFTensors, buckets, widest
from megatron_prepo.process import activity, machine, progress
from megatron_prepo.prompt_context import read_context
from megatron_prepo.records import Prompt
from megatron_prepo.rewards import FUNCTIONS
from megatron_prepo.rewards.output import OUTPUT
from megatron_prepo.rewards.pool import Grader
from megatron_prepo.rollout import build
from megatron_prepo.rollout.engine import Engine
from megatron_prepo.rollout.stopping import unused_end_token

PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "run": {"dir": "-"},
    "model": {"hf": "-"},
    "data": {"train": "-", "eval": "-"},
    "selection": {"num_candidates": 1, "num_selected": 1},
    "train": {"total_steps": 1, "micro_batch_tokens": 1 << 40},
}
"""Settings that a configuration requires and an evaluation does not read."""
FIXED_SETTINGS = (
    ("model", ("dtype", "fp32_lm_head")),
    ("data", ("chat_template", "chat_template_arguments", "chat_template_date")),
    ("data", ("system", "few_shot", "max_prompt_tokens", "overlong_prompts")),
    ("data", ("prompt_field", "answer_field")),
    ("rollout", ("engine", "max_new_tokens", "stop", "stop_tokens")),
    ("reward", ("function", "low", "high", "seconds", "memory_mb")),
    ("eval", ("samples_per_prompt", "temperature", "top_p", "top_k", "max_prompts")),
    ("train", ("seed",)),
)
"""Settings that must not change when an evaluation is resumed."""

MEGATRON_MARKS = ("latest_checkpointed_iteration.txt", "metadata.json")
"""Files by which a Megatron checkpoint is recognised; one of them is enough."""

Named = Sequence[tuple[str, str]]
"""Names and paths of models or of suites."""


@dataclass(frozen=True)
class Model:
    """A model to evaluate."""

    name: str
    place: Path
    """The path that the user gave: a Hugging Face directory, a Megatron checkpoint, or a run."""
    hf: Path
    """The Hugging Face directory to load."""
    rollouts: int | None = None
    """Rollouts that the run generated for it; None if it is not from a finished run."""


def load_settings(path: str | Path | None, models: Named, overrides: Sequence[str]) -> Config:
    """Return the settings of a configuration file with overrides applied.

    Without a file, those of the first run among the models are used; without a run, the overrides
    alone, and models are evaluated in the type of their weights unless `model.dtype` is given.
    """
    runs = (Path(place) / "config.yaml" for _, place in models)
    source = path or next((file for file in runs if file.is_file()), None)
    if source:
        day = prompt_digests.recorded_date(Path(source).parent)
        config = configuration.load(source, overrides)
        return dataclasses.replace(config, data=dated(config.data, day))
    given = any(override.startswith("model.dtype=") for override in overrides)
    own = [] if given else [f"model.dtype={own_dtype(Path(place) for _, place in models)}"]
    return overridden(PLACEHOLDERS, [*own, *overrides])


def own_dtype(places: Iterable[Path]) -> str:
    """Return bfloat16 if it represents all weights of the models, else float32."""
    dtypes = [dtype for place in places for dtype in _weight_dtypes(place)]
    return "bfloat16" if not dtypes or widest(dtypes) is torch.bfloat16 else "float32"


def _weight_dtypes(place: Path) -> set[torch.dtype]:
    """Return the types of a model's tensors from its files; empty for anything else."""
    if (place / "config.json").is_file():
        with HFTensors(place) as tensors:
            return {tensor.dtype for tensor in tensors.places.values()}
    if _is_megatron(place):
        from megatron_prepo.actor.checkpoint import newest
        from megatron_prepo.models.torch_dist import TorchDistReader

        reader = TorchDistReader(newest(place))
        return {reader.dtype(key) for key in reader.weights()}
    return set()


def _is_megatron(place: Path) -> bool:
    return any((place / mark).is_file() for mark in MEGATRON_MARKS)


def dated(data: DataConfig, day: date | None) -> DataConfig:
    """Return the section with this date for the chat template, unless one is set."""
    if day is None or not data.chat_template or data.chat_template_date is not None:
        return data
    return dataclasses.replace(data, chat_template_date=day.isoformat())


def held_out(data: DataConfig) -> list[tuple[str, str]]:
    """Return the run's held-out prompts, `data.eval`, as suites."""
    if data.eval == PLACEHOLDERS["data"]["eval"]:
        raise UserError("no prompts: give --suite NAME=FILE, or a run as a model")
    return [(name or "held out", file) for name, file in data.eval_files.items()]


def evaluate_models(
    config: Config, models: Named, suites: Named, directory: Path
) -> dict[str, Any]:
    """Generate and grade the missing completions; return the contents of `results.json`.

    Raises UserError for a model or suite that cannot be read, and if the directory holds an
    evaluation with other settings, models or suites.
    """
    refuse_other_files(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with lock.held(directory / lock.FILE, f"--out {directory}"):
        day = _first_start_date(directory) or date.today()
        config = dataclasses.replace(config, data=dated(config.data, day))
        agree(directory, fixed_settings(config), dict(models), dict(suites))
        return _evaluate_models(config, models, suites, directory)


def _evaluate_models(
    config: Config, models: Named, suites: Named, directory: Path
) -> dict[str, Any]:
    results: dict[str, Any] = {
        "settings": fixed_settings(config),
        "models": {},
        "machine": machine.describe(),
    }
    output = directory / "logs" / OUTPUT
    if config.reward.function not in FUNCTIONS:
        print(f"reward.function={config.reward.function} prints to {output}", file=sys.stderr)
    with closing(Grader(config.reward, output=output)) as grader:
        for name, place in models:
            model = find_model(name, Path(place), directory, config.model.hf)
            results["models"][name] = evaluate_model(config, model, suites, directory, grader)
            write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
            write_text(directory / "table.md", table.markdown(results))
    return results


def refuse_other_files(directory: Path) -> None:
    """Raise UserError if a directory without an evaluation has files that one would overwrite."""
    if (directory / "evaluation.json").is_file():
        _note(directory / "evaluation.json")
        return
    names = ("results.json", "table.md", "completions", "exported", "logs")
    found = [name for name in names if os.path.lexists(directory / name)]
    if found:
        raise UserError(
            f"--out {directory} has no evaluation.json, so no evaluation wrote its "
            f"{', '.join(found)}; nothing was changed: choose another --out, or move them away"
        )


def find_model(name: str, place: Path, directory: Path, hf: str) -> Model:
    """Return the model in Hugging Face format; a Megatron checkpoint is exported once.

    `hf`: `model.hf`, for a checkpoint that is not in a run.
    """
    if (place / "config.json").is_file():
        return Model(name, place, place)
    if (place / "config.yaml").is_file():
        run = configuration.load(place / "config.yaml")
        summary = place / "summary.json"
        rollouts = json.loads(summary.read_text())["rollouts"] if summary.is_file() else None
        if (place / "hf" / "config.json").is_file():
            return Model(name, place, place / "hf", rollouts)
        exported = export(name, place / "checkpoints", directory, run.model.hf)
        return Model(name, place, exported, rollouts)
    if _is_megatron(place):
        given = None if hf == PLACEHOLDERS["model"]["hf"] else hf
        return Model(name, place, export(name, place, directory, given))
    raise UserError(
        f"{place} is neither a Hugging Face directory (config.json), nor a Megatron checkpoint "
        "(latest_checkpointed_iteration.txt), nor a run (config.yaml)"
    )


def export(name: str, megatron: Path, directory: Path, hf: str | None) -> Path:
    """Export a checkpoint; `hf` provides the configuration if the checkpoint does not hold it."""
    out = directory / "exported" / name
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "checkpoints_convert", "export", "--megatron", megatron]
        command += ["--out", out, *(["--hf", hf] if hf else [])]
        with activity.doing(f"exporting {name} to {out}"):
            done = subprocess.run(
                list(map(str, command)),
                env=os.environ | {activity.QUIET: "1"},
                capture_output=True,
                text=True,
            )
        if done.returncode:
            raise UserError(f"{megatron}: {done.stderr.strip().removeprefix('error: ')}")
    return out


def evaluate_model(
    config: Config, model: Model, suites: Named, directory: Path, grader: Grader
) -> dict[str, Any]:
    """Return the numbers of one model: each suite, and the mean over suites."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hf=str(model.hf), megatron=None),
        run=dataclasses.replace(config.run, dir=str(directory)),
    )
    preflight.check_opens(model.hf)
    tokenizer = preflight.read_tokenizer(config.model.hf)
    hf = read_hf_config(config.model.hf, for_megatron=False)
    stops = preflight.check_stop_tokens(config.model.hf, hf, tokenizer, config.rollout)
    if warning := unused_end_token(stops, tokenizer):
        print(f"{model.name}: {'; '.join(warning)}", file=sys.stderr)
    by_suite: dict[str, Completions] = {}
    for name, file in suites:
        prompts = suite_prompts(config, tokenizer, file, needs_answer="answer" in grader.takes)
        path = directory / "completions" / model.name / f"{name}.jsonl"
        by_suite[name] = Completions(path, prompts, config.eval.samples_per_prompt)
    if any(completions.missing() for completions in by_suite.values()):
        with activity.doing(f"loading {model.name}"):
            loaded = engine_with_files(config, tokenizer)
        with closing(loaded) as engine:
            for name, completions in by_suite.items():
                complete(config, engine, grader, completions, f"{model.name} on {name}")
    high = config.reward.high
    numbers = {name: table.suite_numbers(found, high) for name, found in by_suite.items()}
    passed = [completions.avg_P(high) for completions in by_suite.values()]
    return {
        "place": str(model.place),
        "rollouts": model.rollouts,
        "suites": numbers,
        "mean": mean_with_ci95(passed, config.eval.samples_per_prompt),
    }


def suite_prompts(
    config: Config, tokenizer: Any, file: str, *, needs_answer: bool = True
) -> list[Prompt]:
    """Read a suite's prompts; UserError if their completions exceed the model's positions."""
    dropped: list[str] = []
    prompts = read_prompts(
        file,
        tokenizer,
        max_tokens=config.data.max_prompt_tokens,
        chat_template=config.data.chat_template,
        date=prompt_digests.template_date(config.data, config.run),
        context=read_context(config.data, tokenizer),
        dropped=dropped if config.data.overlong_prompts == "drop" else None,
        needs_answer=needs_answer,
        fields=config.data.fields,
    )[: config.eval.max_prompts]
    if dropped:
        limit = f"data.max_prompt_tokens={config.data.max_prompt_tokens}"
        print(f"{file}: dropped {len(dropped):,} prompts longer than {limit}", file=sys.stderr)
    hf = read_hf_config(config.model.hf, for_megatron=False)
    preflight.check_room(config.rollout, hf, prompts)
    return prompts


def engine_with_files(config: Config, tokenizer: Any) -> Engine:
    """Return the configured engine with the weights of `model.hf`."""
    build.check(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = build.build_engine(config, tokenizer, device=device)
    give_files(engine, config.model, bucket_bytes=config.weight_sync.bucket_mb << 20)
    return engine


def give_files(engine: Engine, model: ModelConfig, *, bucket_bytes: int) -> None:
    """Send the parameters in the files of `model.hf` to the engine, as `model.dtype`."""
    dtype = getattr(torch, model.dtype)
    tied = read_hf_config(model.hf, for_megatron=False)["tie_word_embeddings"]
    with HFTensors(model.hf, tied=tied) as tensors:
        names = [
            name
            for name in tensors.places
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
        ]
        shapes = {name: (dtype, tensors.places[name].shape) for name in names}
        weights = ((name, tensors[name].to(dtype)) for name in names)
        engine.load_weights(buckets(weights, bucket_bytes), 0, shapes)


def complete(
    config: Config, engine: Engine, grader: Grader, completions: Completions, title: str
) -> None:
    """Generate and grade the missing completions in batches, each saved when it is graded."""
    samples = config.eval.samples_per_prompt
    at_once = config.rollout.batch_size
    if config.rollout.engine == "sglang":
        servers = config.servers
        at_once = 4 * servers.concurrency * (len(servers.urls) or servers.count or 1)
    step = max(1, at_once // samples)
    missing, total = completions.missing(), len(completions.prompts) * samples
    done = total - len(missing) * samples
    with progress.bar(desc=title, total=total, initial=done) as bar:
        for first in range(0, len(missing), step):
            prompts = missing[first : first + step]

            def show(part: int, _: int, before: int = done) -> None:
                bar.update(before + part - bar.n)

            rollouts = engine.generate(evaluation_request(config, prompts, samples, show))
            completions.append(rollouts, grader.grade(rollouts))
            done += len(rollouts)
            bar.update(done - bar.n)


def fixed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine the completions and their grades."""
    tree = configuration.to_tree(config)
    return {f"{s}.{name}": tree[s][name] for s, names in FIXED_SETTINGS for name in names}


def agree(
    directory: Path, settings: dict[str, Any], models: dict[str, str], suites: dict[str, str]
) -> None:
    """Record what is evaluated; UserError if the record has other contents under a same name.

    `settings`: see `fixed_settings`.
    """
    odd = [name for name in [*models, *suites] if not name or "/" in name]
    if odd:
        raise UserError(
            f"{odd[0]!r} cannot name a model or a suite: it is used as a file name; give NAME=PLACE"
        )
    places = {name: _model_digest(Path(place)) for name, place in models.items()}
    files = {name: _file_digest(Path(file)) for name, file in suites.items()}
    file, colon, function = settings["reward.function"].rpartition(":")
    if colon:
        settings = settings | {"reward.function": f"{_file_digest(Path(file))}:{function}"}
    if settings["data.few_shot"] is not None:
        settings = settings | {"data.few_shot": _file_digest(Path(settings["data.few_shot"]))}
    # as the record will hold them: a tuple is a list there
    settings = json.loads(json.dumps(settings))
    note = {"settings": settings, "models": places, "suites": files}
    path = directory / "evaluation.json"
    if path.is_file():
        before = _note(path)
        for kind, values in note.items():
            for name, value in values.items():
                if before[kind].get(name, value) != value:
                    raise UserError(
                        f"{directory} holds an evaluation with another {kind[:-1]} {name}: "
                        f"{before[kind][name]} recorded, {value} given; choose another --out"
                    )
            note[kind] = before[kind] | values
    directory.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(note, indent=2) + "\n")


def _note(path: Path) -> dict[str, dict[str, Any]]:
    try:
        note: dict[str, dict[str, Any]] = json.loads(path.read_text())
        if all(isinstance(note[kind], dict) for kind in ("settings", "models", "suites")):
            return note
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is not the record of an evaluation; choose another --out")


def _first_start_date(directory: Path) -> date | None:
    path = directory / "evaluation.json"
    if not path.is_file():
        return None
    day = _note(path)["settings"].get("data.chat_template_date")
    return None if day is None else date.fromisoformat(day)


def _file_digest(path: Path) -> str:
    if not rows.exists(path):
        raise UserError(f"no such prompt file: {path}")
    content = b"".join(file.read_bytes() for file in rows.data_files(path))
    return hashlib.sha256(content).hexdigest()[:16]


def _model_digest(place: Path) -> str:
    """Return a digest of the model's content (`inputs/digests.py`), wherever it lies."""
    if not (place / "config.json").is_file() and (place / "config.yaml").is_file():  # a run
        exported = (place / "hf" / "config.json").is_file()
        place = place / ("hf" if exported else "checkpoints")
    setting = "model.hf" if (place / "config.json").is_file() else "model.megatron"
    facts = sorted(inputs.file_digests(setting, place).items())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
