"""The actor: a Megatron-Core model that scores sequences and is trained on rollouts.

Every rank calls the same method with the same arguments.  Data-parallel ranks split the sequences
between them, and the complete results are returned on every rank.

Normalisation of losses.  The loss is a sum over tokens that includes all normalisers (`loss.py`),
so the required gradient is that of the plain sum over micro-batches m, data-parallel ranks d and
the slices c of their rows (context parallelism).  Megatron's schedule multiplies the loss of each
slice by the number of slices C and divides it by the number of micro-batches M (for a `loss_func`
with two results), and its DDP averages gradients over the D * C ranks:

    gradient = (1/(D C)) sum_d sum_c sum_m (C/M) grad loss_func(d, c, m)

so `loss_func` returns ``M * D * loss``, and the gradient that arrives at `loss` in backward is
D * C times the optimizer's loss scale.  `vocab_parallel_loss` gets this factor as an argument,
since it accumulates the head's gradient before backward.  Tests compare all of this with one rank
and one micro-batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_prepo.actor import checkpoint, parallel
from megatron_prepo.actor.async_save import HostBuffers, PendingCheckpoint
from megatron_prepo.actor.attention import padding_multiple
from megatron_prepo.actor.context_parallel import context_group
from megatron_prepo.actor.lm_head import (
    IGNORE,
    TokenLoss,
    chunk_tokens_within,
    vocab_parallel_logprobs_and_entropy,
    vocab_parallel_loss,
)
from megatron_prepo.actor.micro_batch import MicroBatch, micro_batch
from megatron_prepo.actor.model import build_model, output_weight
from megatron_prepo.actor.optimizer import build_optimizer, ddp_config
from megatron_prepo.actor.packing import PackingPlan, plan_rows
from megatron_prepo.actor.router_replay import RouterReplay
from megatron_prepo.config import Config, LossConfig
from megatron_prepo.models import lora
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.hf_to_megatron import load_hf_weights
from megatron_prepo.models.megatron_to_hf import (
    Part,
    gradient_plan,
    hf_gradients,
    hf_plan,
    hf_shapes,
    hf_weights,
    save_hf,
)
from megatron_prepo.models.peft_files import save_peft
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.models.shape import Shape
from megatron_prepo.prepo.loss import (
    LossTerms,
    Objective,
    cispo,
    clipped,
    dual_clipped,
    gspo,
    policy_loss,
)
from megatron_prepo.records import ScoredSequence


@dataclass(frozen=True)
class Scores:
    """Scores of the scored tokens of one sequence, in order, float32 on the CPU."""

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor
    hidden_D: torch.Tensor | None = None
    """Mean of the projected last hidden states over the scored tokens, if a projection was given.

    The states are those that the scores are computed from: a token's is its predecessor's.
    """


@dataclass(frozen=True)
class TrainingSequence:
    """A rollout with all inputs of the loss."""

    sequence: ScoredSequence
    old_logprobs_T: torch.Tensor
    advantage: float
    coefficient: float
    importance_T: torch.Tensor | None = None
    reference_logprobs_T: torch.Tensor | None = None
    advantage_T: torch.Tensor | None = None
    """Advantages of its tokens, if they differ; `advantage` is then their mean."""


@dataclass(frozen=True)
class BackwardResult:
    """Result of a backward pass; the gradient itself is in Megatron's buffers, not clipped."""

    totals: dict[str, float]
    """Loss and loss statistics, summed over the tokens of all ranks."""
    norm: float
    finite: bool
    """Whether loss, norm and every element of the gradient are finite on all ranks."""
    plan: PackingPlan
    """Rows of the mini-batch."""


class Actor:
    """This rank's part of the trained model.  Call `parallel.initialize` first.

    With `resumes`, call `load` next: the weights that the run started from are then read only as
    the reference of `loss.kl_coef`.  `weights`: a checkpoint to start from; default: the model's.
    """

    def __init__(
        self, config: Config, *, resumes: bool = False, weights: str | Path | None = None
    ) -> None:
        self.config = config
        self.hf = read_hf_config(config.model.hf)
        self.shape = Shape.of(self.hf)
        self.device = parallel.device()
        built = build_model(self.hf, config.model, config.parallel, config.megatron, config.lora)
        self.chunks = [chunk.to(self.device) for chunk in built]
        """One chunk, or stages of an interleaved pipeline; the last one has this rank's head."""
        mcore = self.mcore = self.chunks[0].config
        self.routing = self.router_replay = None
        if config.rollout.router_replay:
            self.routing = RoutingFormat.of(self.hf)
            self.router_replay = RouterReplay(self.chunks, self.device)
        if config.lora.rank:
            lora.initialize(self.chunks, config.train.seed)
        if not resumes or config.loss.kl_coef:
            self._load_initial_weights(weights or config.model.megatron)
        ddp = ddp_config(config.optimizer, config.megatron)
        self.ddp = [DistributedDataParallel(mcore, ddp, chunk) for chunk in self.chunks]
        self.optimizer, self.scheduler = build_optimizer(
            config.optimizer, config.train, config.megatron, self.ddp, dtype=config.model.dtype
        )
        mcore.grad_scale_func = self.optimizer.scale_loss
        mcore.finalize_model_grads_func = finalize_model_grads
        # gradients are reduced when they are complete, in the last micro-batch
        waiting = [ddp.no_sync for ddp in self.ddp]
        mcore.no_sync_func = waiting if len(waiting) > 1 else waiting[0]
        keeps_reference = config.loss.kl_coef and not config.lora.rank
        self.reference = self._copy_of_weights() if keeps_reference else None
        """The initial weights for `loss.kl_coef`; with adapters, these are the frozen ones."""
        self.host_buffers = HostBuffers()
        """Buffers for checkpoints that are written in the background."""
        self.updates = 0
        """Number of optimizer updates so far: the version of the weights."""

    def score(
        self,
        sequences: Sequence[ScoredSequence],
        *,
        temperature: float,
        projection_HD: torch.Tensor | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Scores]:
        """Return log-probabilities and exact entropies of all sequences, by one forward pass.

        With `projection_HD`, float32, it also returns the mean hidden states.  Sequences with a
        routing replay it (`rollout.router_replay`).  `on_progress` is called with the number of
        sequences of each finished micro-batch.
        """
        projection_HD = torch.empty(0, 0) if projection_HD is None else projection_HD
        projection_HD = projection_HD.to(self.device)
        offsets = [0]
        for sequence in sequences:
            offsets.append(offsets[-1] + sequence.num_scored)
        flat_2T = torch.zeros(2, offsets[-1], device=self.device)
        hidden_SD = torch.zeros(len(sequences), projection_HD.shape[1], device=self.device)

        def collect(batch: MicroBatch, hidden: torch.Tensor, non_loss_data: bool) -> None:
            hidden_TH = self._hidden_TH(hidden)
            lengths = [sequences[i].num_scored for i in batch.index]
            scored_2R = torch.zeros(2, sum(lengths), device=self.device)
            scored_2R[:, batch.scored] = torch.stack(self._scores(hidden_TH, batch, temperature))
            parts = scored_2R.split(lengths, dim=1)
            for i, part_2R in zip(batch.index, parts, strict=True):
                flat_2T[:, offsets[i] : offsets[i + 1]] = part_2R
            if projection_HD.numel():
                parts_RH = hidden_TH[batch.targets_T != IGNORE].split(batch.scored_here(lengths))
                for i, part_RH in zip(batch.index, parts_RH, strict=True):
                    hidden_SD[i] += part_RH.sum(dim=0, dtype=torch.float32) @ projection_HD
            if on_progress:
                on_progress(len(batch.index))

        for ddp in self.ddp:
            ddp.eval()
        if self.router_replay:
            self.router_replay.forget_choices()
        with torch.no_grad():
            self._forward_backward(sequences, self.plan(sequences), collect, forward_only=True)
        _share(flat_2T)
        scores = [Scores(*flat_2T[:, a:b].cpu()) for a, b in pairwise(offsets)]
        if not projection_HD.numel():
            return scores
        means = zip(_share(hidden_SD).cpu(), sequences, strict=True)
        hidden = [sum_D / sequence.num_scored for sum_D, sequence in means]
        return [replace(score, hidden_D=h_D) for score, h_D in zip(scores, hidden, strict=True)]

    def routed_differently(self) -> float | None:
        """Return how often the actor would have chosen other experts than the replayed ones.

        The result is a share of the tokens and layers of the last `score`; None without
        `rollout.router_replay`.  Collective.
        """
        return self.router_replay.routed_differently() if self.router_replay else None

    def reference_score(
        self, sequences: Sequence[ScoredSequence], *, temperature: float
    ) -> list[Scores]:
        """Return `score` under the initial weights (kept only with a KL penalty)."""
        assert self.config.loss.kl_coef, "the initial weights are kept only with loss.kl_coef > 0"
        initial_weights = (
            lora.without_adapters(self.chunks)
            if self.reference is None
            else self._weights(self.reference)
        )
        with initial_weights:
            return self.score(sequences, temperature=temperature)

    def update(self, rollouts: Sequence[TrainingSequence]) -> dict[str, float]:
        """Make one optimizer update on one mini-batch; returns the metrics of `step`.

        Raises FloatingPointError like `step`.
        """
        return self.step(self.backward(rollouts))

    def backward(self, rollouts: Sequence[TrainingSequence]) -> BackwardResult:
        """Compute the gradient of one mini-batch's loss, without changing weights.

        Skips rollouts whose gradient is exactly zero.
        """
        rollouts = [r for r in rollouts if self.has_gradient(r.advantage)]
        sequences = [r.sequence for r in rollouts]
        names = ["loss", "tokens", "clipped", "ratio", "kl", "reference_kl"]
        sums = dict.fromkeys(names, torch.zeros((), device=self.device))
        settings, temperature = self.config.loss, self.config.rollout.temperature

        def loss_func(
            batch: MicroBatch, hidden: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            terms = _loss_terms([rollouts[i] for i in batch.index], self.device)[batch.scored]
            objective = _objective(settings, batch, [sequences[i].num_scored for i in batch.index])

            def token_loss(
                logprobs_T: torch.Tensor, entropy_T: torch.Tensor, scored: slice
            ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                return policy_loss(
                    logprobs_T,
                    entropy_T,
                    terms[scored],
                    objective=objective,
                    clip_low=settings.clip_low,
                    clip_high=settings.clip_high,
                    entropy_coef=settings.entropy_coef,
                    kl_coef=0.0 if settings.kl_in_reward else settings.kl_coef,
                )

            loss, parts = self._loss(hidden, batch, temperature, token_loss, loss_scale)
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums[name] + value
            return loss * num_micro_batches * dp_size, {}

        dp_size = parallel_state.get_data_parallel_world_size()
        plan = self.plan(sequences)
        num_micro_batches = len(plan.ranks[0])
        cp_size = parallel_state.get_context_parallel_world_size()
        loss_scale = dp_size * cp_size * float(self.optimizer.get_loss_scale())
        for ddp in self.ddp:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._forward_backward(sequences, plan, loss_func, forward_only=False)
        totals_T = _share(torch.stack([sums[name].float() for name in names]))
        totals = dict(zip(names, totals_T.tolist(), strict=True))
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        finite = self._finite_on_all_ranks(sums["loss"], totals, norm)
        return BackwardResult(totals, norm, finite, plan)

    def step(self, gradient: BackwardResult) -> dict[str, float]:
        """Update the weights with the gradient of the last `backward`; returns metrics.

        Clip fraction, ratio and divergences are means over the tokens of the rollouts that were
        not skipped, and absent if there were none.  The learning rate is that of this update.

        Raises FloatingPointError on all ranks if the gradient is not finite.  Weights, optimizer
        state, learning rate and `updates` are then unchanged: `updates` counts applied updates, and
        the engine still has the current weights.
        """
        totals, plan = gradient.totals, gradient.plan
        if not gradient.finite:
            raise FloatingPointError(
                f"update {self.updates + 1}: non-finite loss or gradient (loss={totals['loss']}, "
                f"grad_norm={gradient.norm}); the update was not applied"
            )
        learning_rate = self.optimizer.param_groups[0]["lr"]  # the scheduler sets the next one
        self.optimizer.step()
        self.scheduler.step(increment=1)
        self.updates += 1
        metrics = {
            "loss/policy": totals["loss"],
            "loss/grad_norm": gradient.norm,
            "loss/learning_rate": learning_rate,
            "train/tokens": float(plan.load.tokens),
            "train/padding_fraction": plan.padding_fraction,
            "train/balance_ratio": plan.balance_ratio,
        }
        if tokens := totals["tokens"]:
            metrics["loss/clip_fraction"] = totals["clipped"] / tokens
            metrics["loss/ratio"] = totals["ratio"] / tokens
            metrics["loss/kl_to_old"] = totals["kl"] / tokens
            if self.config.loss.kl_coef:
                metrics["loss/kl_to_reference"] = totals["reference_kl"] / tokens
        return metrics

    def plan(self, sequences: Sequence[ScoredSequence]) -> PackingPlan:
        """Return the micro-batches of all data-parallel ranks, the same on every rank.

        No communication.  `plan(...).load` counts tokens and attention pairs,
        `load.flops(actor.shape)` operations.
        """
        train = self.config.train
        return plan_rows(
            sequences,
            num_ranks=parallel_state.get_data_parallel_world_size(),
            budget=train.micro_batch_tokens,
            shape=self.shape,
            multiple=padding_multiple(self.mcore),
            rows_multiple=self.config.parallel.pipeline if len(self.chunks) > 1 else 1,
            packing=train.packing,
            share_prefixes=train.share_prefixes,
        )

    def hf_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the current weights under Hugging Face names; collective, see `megatron_to_hf`."""
        self._gather_weights()
        weights: Iterator[tuple[str, torch.Tensor]] = hf_weights(
            self.chunks, self.hf["vocab_size"], self._hf_plan
        )
        return weights

    def hf_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return type and shape of what `hf_weights` yields; collective, transfers no weights."""
        return self._hf_shapes

    @cached_property
    def _hf_plan(self) -> list[Part]:
        return hf_plan(self.chunks)

    @cached_property
    def _hf_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return hf_shapes(self.chunks, self.hf["vocab_size"], self._hf_plan)

    def hf_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the gradient of the last `backward` under Hugging Face names; collective.

        It is the gradient of the plain sum of losses (see above): not clipped, and the same under
        every layout.  With adapters, it is that of their matrices.
        """
        if self.ddp[0].ddp_config.use_distributed_optimizer:
            self._gather_gradient_shards()
        gradients: Iterator[tuple[str, torch.Tensor]] = hf_gradients(
            self.chunks, self.hf["vocab_size"]
        )
        return gradients

    def hf_gradient_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return type of the weight and shape of each gradient of `hf_gradients`; collective."""
        return hf_shapes(self.chunks, self.hf["vocab_size"], gradient_plan(self.chunks))

    def export(self, directory: str | Path, *, write: bool) -> None:
        """Export the model in Hugging Face format; collective, written by the rank with `write`.

        Adapters are merged into it.
        """
        self._gather_weights()
        save_hf(self.chunks, self.hf["vocab_size"], self.config.model.hf, directory, write=write)

    def export_adapter(
        self, directory: str | Path, *, base: str, revision: str | None = None, write: bool
    ) -> None:
        """Export the adapters in the format of `peft`; collective, like `export`.

        `base`, `revision`: name of the model in `model.hf` for other programs (`save_peft`).
        """
        self._gather_weights()
        settings = self.config.lora
        save_peft(self.chunks, settings, directory, base=base, revision=revision, write=write)

    def save(self, directory: str | Path, *, step: int, run_state: str | None = None) -> Path:
        """Write a Megatron checkpoint of this step below `directory`; collective.

        With `checkpoint.optimizer=false` it has weights only, and a run cannot resume from it.
        """
        saving = self.start_saving(directory, step=step, run_state=run_state, copy=False)
        saving.finish(self.config.parallel.timeout_minutes)
        return checkpoint.checkpoint_path(directory, step)

    def start_saving(
        self, directory: str | Path, *, step: int, run_state: str | None = None, copy: bool = True
    ) -> PendingCheckpoint:
        """Start `save` and return the unfinished checkpoint; with `copy`, training may continue.

        The previous copy is overwritten: its checkpoint must be finished.
        """
        self._gather_weights()
        buffers = self.host_buffers if copy else None
        if not self.config.checkpoint.optimizer:
            return checkpoint.start_saving(
                self.chunks,
                directory,
                step=step,
                buffers=buffers,
                hf=self.hf,
                lora=self.config.lora,
            )
        return checkpoint.start_saving(
            self.chunks,
            directory,
            step=step,
            lora=self.config.lora,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            updates=self.updates,
            run_state=run_state,
            buffers=buffers,
            hf=self.hf,
        )

    def load(self, path: Path) -> None:
        """Resume from a checkpoint with optimizer state, written under any layout; collective."""
        self.updates = checkpoint.load(path, self.chunks, self.optimizer, self.scheduler, self.hf)

    def _load_initial_weights(self, megatron: str | Path | None) -> None:
        if megatron:
            checkpoint.load_weights(self.chunks, megatron, self.hf)
        else:
            load_hf_weights(self.chunks, self.config.model.hf)

    def _gather_weights(self) -> None:
        """Wait for the weights of the last update.

        With overlap_param_gather they are otherwise still in transit until the next forward pass.
        """
        for ddp in self.ddp:
            if ddp.ddp_config.overlap_param_gather:
                ddp.start_param_sync(force_sync=True)

    def _gather_gradient_shards(self) -> None:
        """Gather the gradient, of which the distributed optimizer reduced one shard per rank."""
        groups = [
            group
            for ddp in self.ddp
            for group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups)
        ]
        for group in groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(ranks.size())[ranks.rank()]
                dist.all_gather_into_tensor(bucket.grad_data, shard.clone(), group=ranks)

    def _finite_on_all_ranks(
        self, loss: torch.Tensor, totals: dict[str, float], norm: float
    ) -> bool:
        """Return whether loss, norm and the complete gradient are finite on all ranks.

        Each rank checks all that it holds, since no sum covers everything: the norm excludes copies
        of parameters that other tensor-parallel ranks count, and each data-parallel replica has a
        separate norm.
        """
        buffers = [b for d in self.ddp for b in (*d.buffers, *d.expert_parallel_buffers)]
        # the largest magnitude, without a copy of the buffer; NaN if it contains one
        largest = [torch.linalg.vector_norm(b.grad_data, torch.inf).float() for b in buffers]
        mine = torch.stack([loss.float(), *largest]).isfinite().all()
        finite = mine and all(map(math.isfinite, (norm, *totals.values())))
        broken = torch.tensor(float(not finite), device=self.device)
        dist.all_reduce(broken)
        return not broken

    def has_gradient(self, advantage: float) -> bool:
        """Return whether a rollout of this advantage can move a weight.

        False if its gradient is exactly zero: a factor of 0 before its only term.  With a KL
        penalty in the reward, tokens may have advantages although their mean is 0.

        Experts may have additional losses, on whatever tokens they see (`megatron.moe_...`).
        """
        loss, experts = self.config.loss, self.mcore.num_moe_experts
        return bool(advantage or loss.entropy_coef or loss.kl_coef or experts)

    def _forward_backward(
        self,
        sequences: Sequence[ScoredSequence],
        plan: PackingPlan,
        last_stage: Callable[..., Any],
        *,
        forward_only: bool,
    ) -> None:
        """Run Megatron's schedule over this rank's micro-batches.

        `last_stage(batch, hidden, ...)` runs on the last pipeline stage only.
        """
        multiple, context = padding_multiple(self.mcore), context_group()
        micro_batches = [
            micro_batch(
                sequences,
                row,
                multiple=multiple,
                context=context,
                device=self.device,
                routing=self.routing,
            )
            for row in plan.ranks[parallel_state.get_data_parallel_rank()]
        ]

        def forward_step(
            iterator: Iterator[MicroBatch], model: DistributedDataParallel
        ) -> tuple[torch.Tensor, Callable[..., Any]]:
            batch = next(iterator)
            positions_T = batch.layout.positions_T
            assert positions_T is not None, "micro-batches have positions"
            with self._routed(model, batch):
                hidden = model(
                    batch.tokens_T[None], positions_T[None], None, packed_seq_params=batch.layout
                )
            return hidden, partial(last_stage, batch)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.ddp],
            model=self.ddp,
            num_microbatches=len(micro_batches),
            seq_length=1,  # not used: variable_seq_lengths
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        if self.router_replay:
            self.router_replay.check_all_recomputed()

    def _routed(
        self, ddp: DistributedDataParallel, batch: MicroBatch
    ) -> AbstractContextManager[None]:
        """Return a context for a chunk's forward pass, in which its routers replay the routing."""
        if self.router_replay is None:
            return nullcontext()
        return self.router_replay.replaying(self.ddp.index(ddp), batch.routing_TLk)

    def _scores(
        self, hidden_TH: torch.Tensor, batch: MicroBatch, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `logprobs_R` and `entropy_R` of the scored tokens, in order; last stage only."""
        logprobs_T, entropy_T = vocab_parallel_logprobs_and_entropy(
            hidden_TH,
            output_weight(self.chunks[-1]),
            batch.targets_T,
            temperature=temperature,
            **self._head_settings(),
        )
        scored_T = batch.targets_T != IGNORE
        return logprobs_T[scored_T], entropy_T[scored_T]

    def _loss(
        self,
        hidden: torch.Tensor,
        batch: MicroBatch,
        temperature: float,
        token_loss: TokenLoss,
        loss_scale: float,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the result of `token_loss` on the scored tokens of a micro-batch; last stage only.

        `loss_scale` is the gradient that will arrive at the loss.
        """
        hidden_TH = self._hidden_TH(hidden)
        if self.config.loss.head == "recompute":
            return token_loss(*self._scores(hidden_TH, batch, temperature), slice(None))
        return vocab_parallel_loss(
            hidden_TH,
            output_weight(self.chunks[-1]),
            batch.targets_T,
            token_loss,
            temperature=temperature,
            loss_scale=loss_scale,
            **self._head_settings(),
        )

    def _hidden_TH(self, hidden_1TH: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of all tokens, complete on every tensor-parallel rank.

        The backward pass of the region sums the ranks' parts of their gradient, once.
        """
        if self.mcore.sequence_parallel:
            return gather_from_sequence_parallel_region(
                hidden_1TH.squeeze(0), tensor_parallel_output_grad=True
            )
        # Its backward sums in place, and loses the sum of a non-contiguous gradient (megatron-core
        # 0.16.1, mappings._reduce): nothing may be transposed after it.
        return copy_to_tensor_model_parallel_region(hidden_1TH.squeeze(0))

    def _head_settings(self) -> dict[str, Any]:
        return {
            "vocab_size": self.hf["vocab_size"],
            "group": parallel_state.get_tensor_model_parallel_group(),
            "chunk_tokens": chunk_tokens_within(
                self.config.loss.head_memory_mib, output_weight(self.chunks[-1])
            ),
            "fp32_logits": self.config.model.fp32_lm_head,
            # with overlap_grad_reduce, DDP requires a gradient from autograd
            "into_main_grad": not self.ddp[0].ddp_config.overlap_grad_reduce,
        }

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (p for chunk in self.chunks for p in chunk.parameters())

    def _copy_of_weights(self) -> list[torch.Tensor]:
        self._gather_weights()
        return [p.detach().clone() for p in self._parameters()]

    @contextmanager
    def _weights(self, other: list[torch.Tensor]) -> Iterator[None]:
        current = self._copy_of_weights()
        self._set_weights(other)
        try:
            yield
        finally:
            self._set_weights(current)

    @torch.no_grad()
    def _set_weights(self, weights: list[torch.Tensor]) -> None:
        for parameter, weight in zip(self._parameters(), weights, strict=True):
            parameter.copy_(weight)


def _objective(settings: LossConfig, batch: MicroBatch, lengths: Sequence[int]) -> Objective:
    """Return the objective of `loss.policy`; `lengths`: scored tokens of each sequence."""
    if settings.policy == "dual-clip":
        return partial(dual_clipped, dual_clip=settings.dual_clip)
    if settings.policy == "cispo":
        return cispo
    if settings.policy == "gspo":
        here_M, lengths_M = (
            torch.tensor(counts, dtype=torch.long, device=batch.targets_T.device)
            for counts in (batch.scored_here(lengths), lengths)
        )
        return partial(gspo, here_M=here_M, lengths_M=lengths_M, group=context_group())
    assert settings.policy == "clipped", f"unknown policy {settings.policy!r}"
    return clipped


def _loss_terms(rollouts: Sequence[TrainingSequence], device: torch.device) -> LossTerms:
    """Return the loss terms of the tokens of some rollouts, flat and in order."""

    def per_token(values: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.empty(0), *values]).to(device)

    def constant(r: TrainingSequence, value: float) -> torch.Tensor:
        return torch.full_like(r.old_logprobs_T, value)

    def optional(name: str) -> torch.Tensor | None:
        if any(getattr(r, name) is None for r in rollouts):
            return None
        return per_token(getattr(r, name) for r in rollouts)

    return LossTerms(
        old_logprobs_T=per_token(r.old_logprobs_T for r in rollouts),
        advantage_T=per_token(
            constant(r, r.advantage) if r.advantage_T is None else r.advantage_T for r in rollouts
        ),
        coefficient_T=per_token(constant(r, r.coefficient) for r in rollouts),
        importance_T=optional("importance_T"),
        reference_logprobs_T=optional("reference_logprobs_T"),
    )


def _share(values: torch.Tensor) -> torch.Tensor:
    """Sum values of last pipeline stages over data- and context-parallel ranks, in place.

    The result is the same on all ranks.  The tensor-parallel ranks of a last stage hold equal
    values, of which those of the first one are counted.
    """
    first_of_last_stage = (
        parallel_state.is_pipeline_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )
    if not first_of_last_stage:
        values.zero_()
    dist.all_reduce(values)
    return values
