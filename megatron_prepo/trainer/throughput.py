"""Speed of the actor's passes in a step: tokens and operations per second and rank.

| metric | meaning |
|---|---|
| `speed/STAGE_tokens` | tokens per second and rank, of the sequences in the stage |
| `speed/STAGE_tflops` | 10^12 operations per second and rank, counted as in `models/flops.py` |
| `speed/STAGE_mfu` | these over the GPU's published peak (`plan/gpus.py`), if one is known |
| `memory/peak_gib` | the maximum that torch's allocator held on a rank during the step; CUDA only |

for the stages `perplexity`, `old_logprobs` and `update`.  Seconds are those of the complete
stage, with all that is not arithmetic.  A rank's share is the job's over the number of ranks,
whatever the layout.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_prepo.actor import parallel
from megatron_prepo.models.flops import FlopCount
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan.gpus import GIB, peak_flops
from megatron_prepo.records import ScoredSequence
from megatron_prepo.run.stopwatch import Stopwatch
from megatron_prepo.selection.base import Candidates

FORWARD, FORWARD_AND_BACKWARD = 1, 3


class Throughput:
    """Rates for the model, layout and GPUs of the run; one per rank."""

    def __init__(self, hf: dict[str, Any], *, dtype: str, by_actor: bool, scorings: int) -> None:
        """Set up; `by_actor`: the actor scores candidates; `scorings`: passes over the rollouts."""
        self.shape, self.ranks = Shape.of(hf), dist.get_world_size()
        self.by_actor, self.scorings = by_actor, scorings
        on_cuda = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if on_cuda else ""
        self.peak = peak_flops(device, dtype)
        self.scored: list[Candidates] = []
        """Candidates scored since the last step was recorded."""

    def of_step(
        self, seconds: Stopwatch, sequences: Sequence[ScoredSequence], learnt: Sequence[bool]
    ) -> dict[str, float]:
        """Return metrics of the step, from the candidates scored and the rollouts trained on.

        `learnt`: which of the sequences the update passes through.  With `train.overlap` a step
        scores the next step's candidates, and the first also its own.
        """
        count = partial(FlopCount.of, window=self.shape.window)
        prompts = count(
            ScoredSequence(prompt.tokens, 1)
            for candidates in self.scored
            if self.by_actor and candidates.ppl_P is not None
            for prompt in candidates.prompts
        )
        trained = count(itertools.compress(sequences, learnt))
        self.scored.clear()
        rates: dict[str, float] = {}
        for stage, work, passes, forwards in (
            ("perplexity", prompts, 1, FORWARD),
            ("old_logprobs", count(sequences), self.scorings, FORWARD),
            ("update", trained, 1, FORWARD_AND_BACKWARD),
        ):
            spent = seconds.so_far(stage) * self.ranks / passes
            rates |= self.rates(stage, work, forwards, spent)
        return rates | peak_memory()

    def rates(self, stage: str, work: FlopCount, forwards: int, seconds: float) -> dict[str, float]:
        """Return the rates of one pass that costs `forwards` forward passes.

        `seconds` are summed over all ranks.  Empty if nothing was computed.
        """
        if not (work.tokens and seconds):
            return {}
        flops = forwards * work.flops(self.shape) / seconds
        rates = {
            f"speed/{stage}_tokens": work.tokens / seconds,
            f"speed/{stage}_tflops": flops / 1e12,
        }
        if self.peak:
            rates[f"speed/{stage}_mfu"] = flops / self.peak
        return rates


def peak_memory() -> dict[str, float]:
    """Return the highest peak memory of any rank, and reset it; collective on CUDA."""
    if not torch.cuda.is_available():
        return {}
    peak = max(parallel.gather_to_all(torch.cuda.max_memory_allocated()))
    torch.cuda.reset_peak_memory_stats()
    return {"memory/peak_gib": peak / GIB}
