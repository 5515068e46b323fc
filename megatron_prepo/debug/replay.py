"""Replay of a dumped step's updates, under any layout, and comparison with the dump.

    megatron-prepo replay runs/demo/dumps/step_0003 parallel.tensor=2 train.micro_batch_tokens=4096

No engine is started and no rollout is generated, so a replay also runs the training half alone.
It compares the scores before the updates, and for each update the loss, the gradient norm and every
tensor's gradient, under Hugging Face names.  A tensor g' of the replay differs if

    |g' - g| > tolerance * max(|g|, 1e-3 * |complete gradient of the dump|)

The floor is for gradients that are zero except for rounding, such as that of a key's bias.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_prepo.actor import checkpoint, parallel
from megatron_prepo.actor.actor import Actor
from megatron_prepo.debug.dump import Dump, read, write_gradients
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_files import HFTensors

ONE_RANK = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.context=1",
    "parallel.expert=1",
    "parallel.data=1",
    "parallel.sequence=false",
    "optimizer.use_distributed_optimizer=false",
)
ONE_RANK_FOLDER = "one_rank"
"""Folder in a dump for gradients that one rank computed later, if the run saved none."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
FLOOR = 1e-3


@dataclass(frozen=True)
class ComparedNumber:
    """A number of the dump next to the replay's."""

    name: str
    before: float
    now: float
    error: float
    """Relative or absolute difference, compared with the tolerance."""


@dataclass
class Comparison:
    """All compared numbers and tensors."""

    tolerance: float
    numbers: list[ComparedNumber] = field(default_factory=list)
    tensors: list[ComparedNumber] = field(default_factory=list)

    def add_number(self, name: str, before: float, now: float) -> None:
        """Compare a number by its relative difference; two non-finite numbers do not differ."""
        error = abs(now - before) / max(abs(before), 1e-12)
        if not math.isfinite(error):
            error = math.inf if math.isfinite(before) or math.isfinite(now) else 0.0
        self.numbers.append(ComparedNumber(name, before, now, error))

    def add_tensor(self, name: str, before: torch.Tensor, now: torch.Tensor, floor: float) -> None:
        """Compare a tensor by the relative norm of the difference.

        Its non-finite elements must be the same ones in both.
        """
        before, now = before.double(), now.double().cpu()
        alike = torch.equal(before.isfinite(), now.isfinite())
        difference = (now - before).nan_to_num(0.0, 0.0, 0.0).norm()
        scale = before.nan_to_num(0.0, 0.0, 0.0).norm().clamp(min=max(floor, 1e-12))
        error = float(difference / scale) if alike else math.inf
        self.tensors.append(ComparedNumber(name, float(before.norm()), float(now.norm()), error))

    def differing(self) -> list[ComparedNumber]:
        """Return the differences beyond the tolerance: numbers, then tensors, the largest first."""
        return [row for row in (*self.numbers, *self._worst_first()) if row.error > self.tolerance]

    def text(self, *, num_tensors: int | None = 5) -> str:
        """Format a table of all numbers and of the tensors with the largest differences."""
        wrong = self.differing()
        count = num_tensors and max(num_tensors, sum(row in self.tensors for row in wrong))
        rows = [*self.numbers, *self._worst_first()[:count]]
        width = max(len(row.name) for row in rows)
        lines = [f"{'':{width}} {'dump':>14} {'replay':>14} {'difference':>11}"]
        for row in rows:
            mark = "  differs" if row in wrong else ""
            line = f"{row.name:{width}} {row.before:14.6e} {row.now:14.6e} {row.error:11.1e}{mark}"
            lines.append(line)
        verdict = f"{len(wrong)} of {len(self.numbers) + len(self.tensors)} differ"
        return "\n".join([*lines, f"{verdict} (tolerance {self.tolerance:g})"])

    def _worst_first(self) -> list[ComparedNumber]:
        return sorted(self.tensors, key=lambda row: -row.error)


def run(
    directory: str | Path,
    overrides: Sequence[str] = (),
    *,
    tolerance: float | None = None,
    num_tensors: int | None = 5,
    write: bool = False,
) -> Comparison:
    """Run one rank of `megatron-prepo replay`; rank 0 prints the table.

    `write`: save the gradients in the dump, for replays of a dump without them.
    Raises UserError that names what differs.
    """
    dump = read(directory, overrides)
    parallel.initialize(dump.config.parallel, dump.config.train.seed)
    comparison = replay(dump, tolerance=tolerance, write=write)
    if dist.get_rank() == 0:
        print(comparison.text(num_tensors=num_tensors), flush=True)
    differing = [row.name for row in parallel.from_rank_zero(comparison).differing()]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(f"the replay differs from the dump in {', '.join(differing[:3])}{more}")
    return comparison


def replay(dump: Dump, *, tolerance: float | None = None, write: bool = False) -> Comparison:
    """Run the updates of a dump under its configuration; collective.  Rank 0 compares gradients.

    Each update starts from the weights that it had in the run, so a wrong update does not affect
    the next one, and no optimizer is involved.
    """
    config = dump.config
    comparison = Comparison(tolerance or TOLERANCE[config.model.dtype])
    actor = Actor(config, weights=dump.weights(0))
    if dump.about["results"][0]["update"] == 0:  # the scores are those before the first update
        compare_scores(dump, actor, comparison)
    for number, (result, batch) in enumerate(dump.updates()):
        if number:
            checkpoint.load_weights(actor.chunks, dump.weights(number), actor.hf)
        gradient = actor.backward(batch)
        name = f"update {result['update']}"
        comparison.add_number(f"{name}: loss", result["loss"], gradient.totals["loss"])
        comparison.add_number(f"{name}: gradient norm", result["grad_norm"], gradient.norm)
        if write:
            write_gradients(dump.directory / ONE_RANK_FOLDER / f"gradients_{number}", actor)
        else:
            compare_gradients(name, gradients_path(dump, number), actor, comparison)
    return comparison


def compare_scores(dump: Dump, actor: Actor, comparison: Comparison) -> None:
    """Compare log-probabilities and entropies before the updates, by mean absolute difference."""
    temperature = dump.config.rollout.temperature
    scores = actor.score([s.sequence for s in dump.batch], temperature=temperature)
    for name, column in (("old_logprobs_T", "logprobs_T"), ("entropy_T", "entropy_T")):
        before_T = dump.tensors[name]
        now_T = torch.cat([getattr(score, column) for score in scores])
        error = float((now_T - before_T).abs().mean())
        row = ComparedNumber(f"mean of {name}", float(before_T.mean()), float(now_T.mean()), error)
        comparison.numbers.append(row)


def compare_gradients(name: str, before: Path, actor: Actor, comparison: Comparison) -> None:
    """Compare every tensor of the last `backward`'s gradient; rank 0 reads and compares."""
    if dist.get_rank() != 0:
        for _ in actor.hf_gradients():
            pass
        return
    with HFTensors(before) as tensors:
        squares = (float(tensors[n].double().square().sum()) for n in tensors.names())
        norm = math.sqrt(sum(square for square in squares if math.isfinite(square)))
        for tensor, now in actor.hf_gradients():
            comparison.add_tensor(f"{name}: {tensor}", tensors[tensor], now, FLOOR * norm)


def gradients_path(dump: Dump, number: int) -> Path:
    """Return the folder of an update's gradients: those of the run, or those of one rank."""
    name = dump.about["results"][number]["gradients"]
    return dump.directory / (name or f"{ONE_RANK_FOLDER}/gradients_{number}")


def has_gradients(dump: Dump) -> bool:
    """Return whether the dump has gradients for all of its updates."""
    return all(gradients_path(dump, i).is_dir() for i in range(len(dump.about["results"])))
