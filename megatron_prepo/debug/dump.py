"""Dump of a step: all inputs of its optimizer updates, which `replay.py` runs again.

| file | content |
|---|---|
| `step.json` | which step, why it was dumped, the candidates' perplexities, the updates' results |
| `config.yaml` | the run's configuration |
| `rollouts.jsonl` | one rollout per line, in the order of the tensors: text, reward, update |
| `batch.safetensors` | inputs of the loss, routing, entropies; `_T`: tokens of all rollouts |
| `weights_0/`, ... | Megatron checkpoint before each update, with optimizer state |
| `gradients_0/`, ... | gradient of each update, before clipping, under Hugging Face names |

Nothing is pickled except by Megatron in its checkpoints.  A dump gets its name when it is complete.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_prepo import config as configuration
from megatron_prepo.actor.actor import Actor, BackwardResult, Scores, TrainingSequence
from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.inputs import hub
from megatron_prepo.models.hf_files import HFWriter
from megatron_prepo.records import Prompt, Rollout, ScoredSequence
from megatron_prepo.run import directory as run_directory
from megatron_prepo.selection.base import Candidates

FORMAT = 1
KIND = "dump"
"""Kind of a dump in its marker (`ownership.py`)."""


@dataclass(frozen=True)
class StepRecord:
    """Results of a step before its updates."""

    step: int
    candidates: Candidates
    rollouts: Sequence[Rollout]
    rewards_N: torch.Tensor
    scores: Sequence[Scores]
    """Scores by the policy before the first update."""
    mini_batches: Sequence[Sequence[int]]
    """Positions of each update's rollouts."""


class DumpWriter:
    """Writer of the dump of some of a step's updates; collective, rank 0 writes all but shards."""

    def __init__(
        self, directory: Path, actor: Actor, config: Config, record: StepRecord, *, why: str
    ) -> None:
        self.directory, self.actor, self.config, self.record = directory, actor, config, record
        self.aside = directory.with_name(directory.name + ".partial")
        self.writes = dist.get_rank() == 0
        self.about = {"format": FORMAT, "step": record.step, "why": why}
        self.results: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.batch: list[TrainingSequence] = []
        self.index: list[int] = []
        if self.writes:
            ownership.begin(directory)

    def add(self, update: int, batch: Sequence[TrainingSequence], gradient: BackwardResult) -> None:
        """Dump the mini-batch of this update, after its `backward` and before its `step`."""
        index = self.record.mini_batches[update]
        weights = self.aside / f"weights_{len(self.results)}"
        self.actor.save(weights, step=self.record.step)
        name = f"gradients_{len(self.results)}"
        result: dict[str, Any] = {"update": update, "rollouts": len(index), "gradients": None}
        result |= {"loss": gradient.totals["loss"], "grad_norm": gradient.norm}
        if self.config.debug.dump_gradients:
            result["gradients"] = name
            result["not_finite"] = write_gradients(self.aside / name, self.actor)
        self.results.append(result)
        self.batch += batch
        self.index += index
        self.lines += [self._line(i, update) for i in index]

    def finish(self) -> None:
        """Give the dump its name; a dump from before the run was resumed is replaced."""
        if self.writes:
            record, ppl_P = self.record, self.record.candidates.ppl_P
            self.about["candidates"] = [
                {"id": prompt.id, "ppl": None if ppl_P is None else float(ppl_P[p])}
                for p, prompt in enumerate(record.candidates.prompts)
            ]
            self.about["results"] = self.results
            tensors = to_tensors(self.batch)
            tensors["entropy_T"] = torch.cat([record.scores[i].entropy_T for i in self.index])
            tensors["engine_logprobs_T"] = torch.cat(
                [torch.tensor(record.rollouts[i].engine_logprobs) for i in self.index]
            )
            (self.aside / "step.json").write_text(json.dumps(self.about, indent=2) + "\n")
            text = configuration.to_yaml(run_directory.with_absolute_paths(self.config))
            (self.aside / "config.yaml").write_text(text, encoding="utf-8")
            lines = "".join(json.dumps(line) + "\n" for line in self.lines)
            (self.aside / "rollouts.jsonl").write_text(lines)
            save_file(tensors, self.aside / "batch.safetensors")
            ownership.publish(self.aside, self.directory, KIND)
        dist.barrier()

    def _line(self, i: int, update: int) -> dict[str, Any]:
        rollout, tensors = self.record.rollouts[i], ("tokens", "engine_logprobs", "routing")
        line = {k: v for k, v in dataclasses.asdict(rollout).items() if k not in tensors}
        return line | {"reward": float(self.record.rewards_N[i]), "update": update}


@dataclass(frozen=True)
class Dump:
    """A dump as read; its tensors have the names in `batch.safetensors`."""

    directory: Path
    config: Config
    about: dict[str, Any]
    """`step.json`."""
    rollouts: list[Rollout]
    rewards_N: torch.Tensor
    batch: list[TrainingSequence]
    """Sequences of all updates, concatenated."""
    tensors: dict[str, torch.Tensor]

    def updates(self) -> Iterable[tuple[dict[str, Any], list[TrainingSequence]]]:
        """Yield (result, mini-batch) of each update."""
        first = 0
        for result in self.about["results"]:
            yield result, self.batch[first : first + result["rollouts"]]
            first += result["rollouts"]

    def weights(self, number: int) -> Path:
        """Return the checkpoint from which an update started."""
        return self.directory / f"weights_{number}"

    def per_rollout(self, name: str) -> list[torch.Tensor]:
        """Return a tensor of all tokens, split into rollouts."""
        return list(self.tensors[name].split([s.sequence.num_scored for s in self.batch]))


def read(directory: str | Path, overrides: Sequence[str] = ()) -> Dump:
    """Read a dump, with `overrides` of its configuration; UserError if missing or damaged."""
    directory = Path(directory)
    if not (directory / "step.json").is_file():
        raise UserError(f"{directory} is not a dump of a step: no step.json (debug.dump_steps)")
    try:
        about = json.loads((directory / "step.json").read_text())
        if about["format"] != FORMAT:
            raise UserError(
                f"{directory} has format {about['format']}; this version reads {FORMAT}"
            )
        lines = [json.loads(s) for s in (directory / "rollouts.jsonl").read_text().splitlines()]
        tensors = load_file(directory / "batch.safetensors")
        batch = from_tensors(tensors)
        logprobs = tensors["engine_logprobs_T"].split([s.sequence.num_scored for s in batch])
        rollouts = [_rollout(*parts) for parts in zip(lines, batch, logprobs, strict=True)]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the dump {directory} is damaged: {error!r}") from error
    return Dump(
        directory,
        hub.resolved(configuration.load(directory / "config.yaml", overrides)),
        about,
        rollouts,
        torch.tensor([line["reward"] for line in lines]),
        batch,
        tensors,
    )


def to_tensors(batch: Sequence[TrainingSequence]) -> dict[str, torch.Tensor]:
    """Concatenate each field of all sequences; fields that are None are skipped."""
    sequences = [s.sequence for s in batch]
    tensors = {
        "tokens": torch.tensor([token for s in sequences for token in s.tokens]),
        "length_N": torch.tensor([len(s.tokens) for s in sequences]),
        "start_N": torch.tensor([s.start for s in sequences]),
    }
    if any(s.routing is not None for s in sequences):
        routing = bytearray(b"".join(s.routing or b"" for s in sequences))
        tensors["routing"] = torch.frombuffer(routing, dtype=torch.uint8)
    for name in _other_fields():
        values = [getattr(s, name) for s in batch]
        if any(value is None for value in values):
            continue
        tensor = isinstance(values[0], torch.Tensor)
        tensors[name] = torch.cat(values) if tensor else torch.tensor(values).double()
    return tensors


def from_tensors(tensors: dict[str, torch.Tensor]) -> list[TrainingSequence]:
    """Return the sequences that `to_tensors` was given, bit for bit."""
    tokens = tensors["tokens"].split(tensors["length_N"].tolist())
    sequences = [
        ScoredSequence(tuple(t.tolist()), start, routing)
        for t, start, routing in zip(
            tokens, tensors["start_N"].tolist(), _routings(tensors), strict=True
        )
    ]
    num_scored = [s.num_scored for s in sequences]
    columns = {"sequence": sequences}
    for name in _other_fields():
        if name in tensors:
            per_token = name.endswith("_T")
            values = tensors[name].split(num_scored) if per_token else tensors[name].tolist()
            columns[name] = values
    rows = zip(*columns.values(), strict=True)
    return [TrainingSequence(**dict(zip(columns, row, strict=True))) for row in rows]


def write_gradients(directory: Path, actor: Actor) -> list[str]:
    """Save the gradient of the last `backward`; collective.

    Returns the names of tensors with a non-finite element.
    """
    shapes = {
        name: (torch.float32, shape) for name, (_, shape) in actor.hf_gradient_shapes().items()
    }
    writer = None
    if dist.get_rank() == 0:
        writer = HFWriter(directory, shapes, like=None, kind=ownership.LATER_KIND)
    not_finite = []
    for name, gradient in actor.hf_gradients():
        if not gradient.isfinite().all():
            not_finite.append(name)
        if writer:
            writer.write(name, gradient.float())
    if writer:
        writer.finish()
    return not_finite


def _routings(tensors: dict[str, torch.Tensor]) -> list[bytes | None]:
    """Split the routing into sequences; each token but the last has the same number of bytes."""
    routed_N = tensors["length_N"] - 1
    if "routing" not in tensors:
        return [None] * len(routed_N)
    bytes_per_token = len(tensors["routing"]) // int(routed_N.sum())
    parts = tensors["routing"].split((routed_N * bytes_per_token).tolist())
    return [part.numpy().tobytes() for part in parts]


def _other_fields() -> list[str]:
    return [f.name for f in dataclasses.fields(TrainingSequence) if f.name != "sequence"]


def _rollout(
    line: dict[str, Any], batch: TrainingSequence, engine_logprobs_T: torch.Tensor
) -> Rollout:
    line = {k: v for k, v in line.items() if k not in ("reward", "update")}
    prompt = line.pop("prompt")
    prompt = Prompt(**prompt | {k: tuple(prompt[k]) for k in ("tokens", "content")})
    completion = batch.sequence.tokens[batch.sequence.start :]
    routing = batch.sequence.routing
    return Rollout(prompt, completion, tuple(engine_logprobs_T.tolist()), routing=routing, **line)
