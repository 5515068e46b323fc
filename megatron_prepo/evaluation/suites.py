"""`megatron-prepo evaluate`: models on suites of problems, by either engine, resumable.

| in the directory | what |
|---|---|
| `evaluation.json` | settings, models and suites, with which a second start has to agree |
| `completions/MODEL/SUITE.jsonl` | one object a completion, appended as they come |
| `exported/MODEL/` | a Megatron checkpoint in Hugging Face format |
| `results.json`, `table.md` | avg@k and pass@k with intervals; the table in the paper's form |

Nothing of Megatron is loaded, unless a checkpoint of its has to be exported first.  A completion is
that of an evaluation during training with the same seed, weights and engine.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_prepo import config as configuration
from megatron_prepo.config import Config, overridden
from megatron_prepo.data import read_prompts
from megatron_prepo.errors import UserError
from megatron_prepo.evaluation.pass_at_k import mean_with_ci95, pass_at_k, powers_of_two
from megatron_prepo.files import lock
from megatron_prepo.files.atomic import flush, naming, write_text
from megatron_prepo.inputs import digests as inputs
from megatron_prepo.inputs import preflight, prompt_digests
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.hf_files import HFTensors, buckets, widest
from megatron_prepo.process import machine
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rewards.pool import Grade, Grader
from megatron_prepo.rollout import build
from megatron_prepo.rollout.engine import Engine, Request

UNUSED = {
    "run": {"dir": "-"},
    "model": {"hf": "-"},
    "data": {"train": "-", "eval": "-"},
    "selection": {"num_candidates": 1, "num_selected": 1},
    "train": {"total_steps": 1, "micro_batch_tokens": 1 << 40},
}
"""Settings that a configuration must have and an evaluation does not look at."""
DECISIVE = (
    ("model", ("dtype", "fp32_lm_head")),
    ("data", ("chat_template", "chat_template_date", "max_prompt_tokens")),
    ("rollout", ("engine", "max_new_tokens")),
    ("reward", ("function", "low", "high", "seconds", "memory_mb")),
    ("eval", ("samples_per_prompt", "temperature", "max_prompts")),
    ("train", ("seed",)),
)
"""Settings that must not change between the starts of an evaluation."""


MEGATRON_MARKS = ("latest_checkpointed_iteration.txt", "metadata.json")


@dataclass(frozen=True)
class Model:
    """A model to be evaluated."""

    name: str
    place: Path
    """As the user named it: a Hugging Face directory, a Megatron checkpoint, or a run."""
    hf: Path
    """The Hugging Face directory to load."""
    rollouts: int | None = None
    """What a run paid for it."""


def load_settings(
    path: str | None, models: Sequence[tuple[str, str]], overrides: Sequence[str]
) -> Config:
    """From a configuration, or that of the first run among the models; else all by overrides.

    Without `model.dtype` there, models are evaluated in the type of their own weights.
    """
    runs = (Path(place) / "config.yaml" for _, place in models)
    path = path or next((file for file in runs if file.is_file()), None)
    if path:
        day = prompt_digests.recorded_date(Path(path).parent)
        return dated(configuration.load(path, overrides), day)
    given = any(override.startswith("model.dtype=") for override in overrides)
    own = [] if given else [f"model.dtype={own_dtype(Path(place) for _, place in models)}"]
    return overridden(UNUSED, [*own, *overrides])


def own_dtype(places: Iterable[Path]) -> str:
    """bfloat16 if that holds all weights of the models in Hugging Face format, else float32."""
    for place in places:
        if (place / "config.json").is_file():
            with HFTensors(place) as tensors:
                if widest(p.dtype for p in tensors.places.values()) is not torch.bfloat16:
                    return "float32"
    return "bfloat16"


def dated(config: Config, day: date | None) -> Config:
    """The configuration with this date for its chat template, unless it has one."""
    data = config.data
    if day is None or not data.chat_template or data.chat_template_date is not None:
        return config
    return dataclasses.replace(
        config, data=dataclasses.replace(data, chat_template_date=day.isoformat())
    )


def held_out(config: Config) -> list[tuple[str, str]]:
    """The run's own held-out prompts, for want of suites."""
    if config.data.eval == "-":
        raise UserError("no prompts: name them by --suite NAME=FILE, or give a run as a model")
    return [("held out", config.data.eval)]


def evaluate_models(
    config: Config,
    models: Sequence[tuple[str, str]],
    suites: Sequence[tuple[str, str]],
    directory: Path,
) -> dict:
    """Complete, grade and count; returns what `results.json` holds.

    Raises UserError for a model or suite that cannot be read, and if the directory holds an
    evaluation of something else.
    """
    refuse_other_files(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with lock.held(directory / lock.FILE, f"--out {directory}"):
        config = dated(config, _date_of_the_first_start(directory) or date.today())
        agree(directory, config, dict(models), dict(suites))
        return _evaluate_models(config, models, suites, directory)


def _evaluate_models(config: Config, models, suites, directory: Path) -> dict:
    results = {"settings": decisive(config), "models": {}, "machine": machine.describe()}
    with closing(Grader(config.reward)) as grader:
        for name, place in models:
            model = find_model(name, Path(place), directory, config)
            results["models"][name] = evaluate_model(config, model, suites, directory, grader)
            write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
            write_text(directory / "table.md", table(results))
    return results


def refuse_other_files(directory: Path) -> None:
    """UserError if a directory without an evaluation has anything by a name that one writes to."""
    if (directory / "evaluation.json").is_file():
        _note(directory / "evaluation.json")
        return
    names = ("results.json", "table.md", "completions", "exported", "logs")
    found = [name for name in names if os.path.lexists(directory / name)]
    if found:
        raise UserError(
            f"--out {directory} has no evaluation.json, so {', '.join(found)} in it is not an "
            "evaluation's; nothing was touched: choose another --out, or move it away"
        )


def find_model(name: str, place: Path, directory: Path, config: Config) -> Model:
    """What kind of model it is; a Megatron checkpoint is exported, once."""
    if (place / "config.json").is_file():
        return Model(name, place, place)
    if (place / "config.yaml").is_file():
        run = configuration.load(place / "config.yaml")
        summary = place / "summary.json"
        paid = json.loads(summary.read_text())["rollouts"] if summary.is_file() else None
        if (place / "hf" / "config.json").is_file():
            return Model(name, place, place / "hf", paid)
        exported = export(name, place / "checkpoints", directory, run.model.hf)
        return Model(name, place, exported, paid)
    if any((place / mark).is_file() for mark in MEGATRON_MARKS):
        hf = None if config.model.hf == "-" else config.model.hf
        return Model(name, place, export(name, place, directory, hf))
    raise UserError(
        f"{place} is neither a Hugging Face directory (config.json), nor a Megatron checkpoint "
        "(latest_checkpointed_iteration.txt), nor a run (config.yaml)"
    )


def export(name: str, megatron: Path, directory: Path, hf: str | None) -> Path:
    """The checkpoint in Hugging Face format; `hf` has its configuration, if it has not itself."""
    out = directory / "exported" / name
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "checkpoints_convert", "export", "--megatron", megatron]
        command += ["--out", out, *(["--hf", hf] if hf else [])]
        done = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{megatron}: {done.stderr.strip().removeprefix('error: ')}")
    return out


def evaluate_model(config: Config, model: Model, suites, directory: Path, grader: Grader) -> dict:
    """One model's suites and their mean."""
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hf=str(model.hf), megatron=None),
        run=dataclasses.replace(config.run, dir=str(directory)),
    )
    preflight.check_opens(model.hf)
    tokenizer = preflight.read_tokenizer(config.model.hf)
    works = []
    for name, file in suites:
        prompts = prompts_of(config, tokenizer, file)
        path = directory / "completions" / model.name / f"{name}.jsonl"
        works.append((name, Completions(path, prompts, config.eval.samples_per_prompt)))
    if any(completions.missing() for _, completions in works):
        with closing(engine_with_files(config, tokenizer)) as engine:
            for name, completions in works:
                complete(config, engine, grader, completions, f"{model.name} on {name}")
    numbers = {name: count(completions, config.reward.high) for name, completions in works}
    passed = [completions.avg_P(config.reward.high) for _, completions in works]
    return {
        "place": str(model.place),
        "rollouts": model.rollouts,
        "suites": numbers,
        "mean": mean_with_ci95(passed, config.eval.samples_per_prompt),
    }


def prompts_of(config: Config, tokenizer, file: str) -> list[Prompt]:
    """A suite's prompts, with room for their completions."""
    prompts = read_prompts(
        file,
        tokenizer,
        max_tokens=config.data.max_prompt_tokens,
        chat_template=config.data.chat_template,
        date=prompt_digests.template_date(config),
    )[: config.eval.max_prompts]
    hf = read_hf_config(config.model.hf, for_megatron=False)
    preflight.check_room(config, hf, prompts)
    return prompts


def engine_with_files(config: Config, tokenizer) -> Engine:
    """Return the configured engine with the weights of `model.hf`."""
    build.check(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = build.build_engine(config, tokenizer, device=device)
    give_files(engine, config)
    return engine


def give_files(engine: Engine, config: Config) -> None:
    """Send the tensors of the files, as they are, but for the type and what is no parameter."""
    dtype = getattr(torch, config.model.dtype)
    tied = read_hf_config(config.model.hf, for_megatron=False)["tie_word_embeddings"]
    with HFTensors(config.model.hf, tied=tied) as tensors:
        names = [
            name
            for name in tensors.places
            if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
        ]
        shapes = {name: (dtype, tensors.places[name].shape) for name in names}
        weights = ((name, tensors[name].to(dtype)) for name in names)
        engine.load_weights(buckets(weights, config.weight_sync.bucket_mb << 20), 0, shapes)


def complete(
    config: Config, engine: Engine, grader: Grader, completions: "Completions", title: str
) -> None:
    """Generate and grade what is missing, some prompts at a time, each kept as it comes."""
    samples = config.eval.samples_per_prompt
    at_once = config.rollout.batch_size
    if config.rollout.engine == "sglang":
        servers = config.servers
        at_once = 4 * servers.concurrency * max(len(servers.urls), servers.count)
    step = max(1, at_once // samples)
    missing, total = completions.missing(), len(completions.prompts) * samples
    done = total - len(missing) * samples
    with tqdm(desc=title, total=total, initial=done) as bar:
        for first in range(0, len(missing), step):
            prompts = missing[first : first + step]
            request = Request(
                prompts=prompts,
                samples_per_prompt=samples,
                temperature=config.eval.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                seed=f"{config.train.seed}/evaluation",
                on_progress=lambda part, _, before=done: bar.update(before + part - bar.n),
            )
            rollouts = engine.generate(request)
            completions.append(rollouts, grader.grade(rollouts))
            done += len(rollouts)
            bar.update(done - bar.n)


class Completions:
    """A suite's completions in a file: of a prompt all or none, so that it can be gone on with."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], samples: int):
        self.path, self.prompts, self.samples = path, prompts, samples
        self.of_prompt: dict[str, list[dict]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for record in _whole_lines(path):
            self.of_prompt.setdefault(record["prompt"], []).append(record)
        known = {prompt.id for prompt in prompts}
        whole = {
            prompt: records
            for prompt, records in self.of_prompt.items()
            if prompt in known and len(records) == samples
        }
        if path.exists():
            # what was cut off in the middle is made again
            lines = (_line(record) for records in whole.values() for record in records)
            write_text(path, "".join(lines))
        self.of_prompt = whole

    def missing(self) -> list[Prompt]:
        """Prompts without completions."""
        return [prompt for prompt in self.prompts if prompt.id not in self.of_prompt]

    def append(self, rollouts: Sequence[Rollout], grades: Sequence[Grade]) -> None:
        """All samples of some prompts; on disk when it returns."""
        records = [
            {
                "prompt": rollout.prompt.id,
                "sample": i % self.samples,
                "reward": grade.reward,
                "graded": grade.outcome,
                "tokens": len(rollout.tokens),
                "finished": rollout.finished,
                "text": rollout.text,
            }
            for i, (rollout, grade) in enumerate(zip(rollouts, grades, strict=True))
        ]
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.writelines(map(_line, records))
        flush(self.path)
        for record in records:
            self.of_prompt.setdefault(record["prompt"], []).append(record)

    def records(self) -> list[list[dict]]:
        """Of each prompt, its samples."""
        return [self.of_prompt[prompt.id] for prompt in self.prompts]

    def passed_P(self, pass_reward: float) -> list[int]:
        """How many samples of each prompt pass."""
        return [sum(r["reward"] >= pass_reward for r in samples) for samples in self.records()]

    def avg_P(self, pass_reward: float) -> list[float]:
        """avg@k of each prompt."""
        return [passed / self.samples for passed in self.passed_P(pass_reward)]


def count(completions: Completions, pass_reward: float) -> dict:
    """A suite's numbers."""
    samples, passed_P = completions.samples, completions.passed_P(pass_reward)
    records = [record for of_prompt in completions.records() for record in of_prompt]
    return {
        "prompts": len(passed_P),
        "samples": samples,
        "avg": mean_with_ci95([completions.avg_P(pass_reward)], samples),
        "pass_at": {
            # n samples are n / k independent draws of k
            str(k): mean_with_ci95(
                [[pass_at_k(samples, passed, k) for passed in passed_P]], samples // k
            )
            for k in powers_of_two(samples)
        },
        "tokens": sum(record["tokens"] for record in records) / len(records),
        "finished": sum(record["finished"] for record in records) / len(records),
        "failed": sum(record["graded"] != "ok" for record in records),
    }


def table(results: dict) -> str:
    """Rows are models, columns suites: avg@k in per cent with its interval, as in the paper."""
    models = results["models"]
    names = list(dict.fromkeys(s for model in models.values() for s in model["suites"]))
    paid = any(model["rollouts"] is not None for model in models.values())
    samples = next(iter(next(iter(models.values()))["suites"].values()))["samples"]
    head = ["model", *names, "mean", *(["rollouts"] if paid else [])]
    lines = [f"avg@{samples} in per cent (95 % interval)\n", _row(head)]
    lines.append(_row(["---"] + ["--:"] * (len(head) - 1)))
    for name, model in models.items():
        cells = [_cell(model["suites"][suite]["avg"]) for suite in names] + [_cell(model["mean"])]
        rollouts = "" if model["rollouts"] is None else f"{model['rollouts']:,}"
        lines.append(_row([name, *cells, *([rollouts] if paid else [])]))
    return "\n".join(lines) + "\n"


def decisive(config: Config) -> dict:
    """The settings that decide what comes out."""
    tree = configuration.to_tree(config)
    return {f"{s}.{name}": tree[s][name] for s, names in DECISIVE for name in names}


def agree(directory: Path, config: Config, models: dict[str, str], suites: dict[str, str]) -> None:
    """Note what is evaluated; UserError if the directory has something else by the same name."""
    odd = [name for name in [*models, *suites] if not name or "/" in name]
    if odd:
        raise UserError(f"{odd[0]!r} is no name for a model or a suite: it names files")
    places = {name: _digest_of_model(Path(place)) for name, place in models.items()}
    files = {name: _digest_of_file(Path(file)) for name, file in suites.items()}
    note = {"settings": decisive(config), "models": places, "suites": files}
    file, colon, function = config.reward.function.rpartition(":")
    if colon:
        note["settings"]["reward.function"] = f"{_digest_of_file(Path(file))}:{function}"
    path = directory / "evaluation.json"
    if path.is_file():
        before = _note(path)
        for kind, values in note.items():
            for name, value in values.items():
                if before[kind].get(name, value) != value:
                    raise UserError(
                        f"{directory} holds an evaluation with another {kind[:-1]} {name}: "
                        f"{before[kind][name]} there, {value} now; choose another --out"
                    )
            note[kind] = before[kind] | values
    directory.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(note, indent=2) + "\n")


def _note(path: Path) -> dict:
    try:
        note = json.loads(path.read_text())
        if all(isinstance(note[kind], dict) for kind in ("settings", "models", "suites")):
            return note
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is not what an evaluation has noted; choose another --out")


def _date_of_the_first_start(directory: Path) -> date | None:
    path = directory / "evaluation.json"
    if not path.is_file():
        return None
    day = _note(path)["settings"].get("data.chat_template_date")
    return None if day is None else date.fromisoformat(day)


def _digest_of_file(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no such prompt file: {path}")
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _digest_of_model(place: Path) -> str:
    """Of the content that decides numbers (`inputs/digests.py`), wherever it lies."""
    if not (place / "config.json").is_file() and (place / "config.yaml").is_file():  # of a run
        exported = (place / "hf" / "config.json").is_file()
        place = place / ("hf" if exported else "checkpoints")
    setting = "model.hf" if (place / "config.json").is_file() else "model.megatron"
    facts = sorted(inputs.file_digests(setting, place).items())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _whole_lines(path: Path) -> Iterator[dict]:
    """The records of a file up to the first that is torn."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _line(record: dict) -> str:
    # not as UTF-8: a completion may hold half a surrogate pair
    return json.dumps(record, ensure_ascii=True) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: dict) -> str:
    low, high = value["ci95"]
    return f"{100 * value['mean']:.2f} ({100 * low:.1f} to {100 * high:.1f})"
