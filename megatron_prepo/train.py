"""PREPO's training loop (arXiv 2511.00794), the same on every rank.

    score the candidate prompts -> choose those in the perplexity window -> roll them out -> grade
    -> group-relative advantages -> old log-probabilities and entropies -> relative-entropy weights
    -> clipped policy updates -> give the engine the new weights

Letters: P candidates, K selected prompts, G rollouts each, N = K*G rollouts.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoints_convert.megatron_to_hf import save_hf
from megatron_prepo import preflight, report, run_directory
from megatron_prepo.actor import parallel
from megatron_prepo.actor.model import DTYPES, describe
from megatron_prepo.actor.policy import Actor, Scores, TrainingSequence
from megatron_prepo.advantages import group_advantages, zero_variance
from megatron_prepo.config import Config
from megatron_prepo.data import CandidateBatches
from megatron_prepo.entropy_weights import relative_entropy_weights
from megatron_prepo.evaluate import Evaluation, evaluate, mean_ci95
from megatron_prepo.ledger import Ledger, LedgerEntry
from megatron_prepo.loss import rollout_coefficients, truncated_importance
from megatron_prepo.metrics import MetricsLog, Stopwatch, rollout_metrics, selection_metrics
from megatron_prepo.perplexity import prompt_perplexity
from megatron_prepo.records import Rollout, ScoredSequence
from megatron_prepo.rewards import FUNCTIONS, grade
from megatron_prepo.rollout.embedded import EmbeddedEngine
from megatron_prepo.selection import METHODS
from megatron_prepo.weight_sync import sync_weights


def train(config: Config) -> dict:
    """Run the configuration to its end; returns the summary, which is also in the run's directory.

    Collective: every rank of the job calls it.  Raises UserError for a wrong input before any
    weight is loaded.
    """
    inputs = preflight.check(config)
    parallel.initialize(config.parallel, config.train.seed)
    run = Run(config)
    run.say(describe(config))
    if config.sglang:
        run.say("the section sglang: is ignored by rollout.engine=embedded")
    with run.seconds("setup"):
        actor, engine = Actor(config), build_engine(config, inputs.tokenizer)
        sync_weights(actor, engine)
    batches = CandidateBatches(
        inputs.train_prompts, config.selection.num_candidates, config.train.seed
    )
    selector = METHODS[config.selection.method](
        config.selection, total_steps=config.train.total_steps, seed=config.train.seed
    )
    rewards_of = partial(
        grade,
        function=FUNCTIONS[config.reward.function],
        low=config.reward.low,
        high=config.reward.high,
    )
    held_out = partial(run.evaluate, engine, inputs.eval_prompts, rewards_of)
    before = held_out("before", 0, config.eval.samples_per_prompt)

    for step in run.steps():
        candidates = batches.next()
        with run.seconds("perplexity"):
            ppl_P = None
            if selector.needs_perplexity:
                ppl_P = prompt_perplexity(actor, candidates, config.selection.ppl_tokens)
        chosen, window = selector.choose(ppl_P, step)
        parallel.assert_equal_on_all_ranks("the selection", chosen)
        selected = [candidates[i] for i in chosen]

        with run.seconds("rollouts"):
            rollouts = engine.generate(
                selected,
                samples_per_prompt=config.rollout.samples_per_prompt,
                temperature=config.rollout.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                seed=f"{config.train.seed}/rollouts/{step}",
            )
        assert all(rollout.weight_version == actor.updates for rollout in rollouts), "stale weights"
        with run.seconds("rewards"):
            rewards_KG = torch.tensor(rewards_of(rollouts)).view(len(selected), -1)
        selector.observe(selected, rewards_KG)
        advantages_KG = group_advantages(
            rewards_KG, std=config.advantage.std, eps=config.advantage.eps
        )

        with run.seconds("old_logprobs"):
            sequences = [scored_sequence(rollout) for rollout in rollouts]
            scores = actor.score(sequences, temperature=config.rollout.temperature)
            references = None
            if config.loss.kl_coef:
                references = actor.reference_score(
                    sequences, temperature=config.rollout.temperature
                )
        entropy_N = torch.stack([score.entropy_T.double().mean() for score in scores])
        lengths_N = torch.tensor([len(rollout.tokens) for rollout in rollouts])

        weight_N = torch.ones_like(entropy_N)
        updates = []
        with run.seconds("update"):
            for batch in mini_batches(
                len(selected), rewards_KG.shape[1], config.train.mini_batches
            ):
                weight_N[batch] = weights_of(config, entropy_N, lengths_N, rewards_KG, batch)
                coefficient_N = rollout_coefficients(
                    weight_N[batch], lengths_N[batch], config.loss.aggregation
                )
                updates.append(
                    actor.update(
                        [
                            training_sequence(
                                config,
                                rollouts[i],
                                scores[i],
                                references[i] if references else None,
                                advantage=float(advantages_KG.flatten()[i]),
                                coefficient=float(coefficient),
                            )
                            for i, coefficient in zip(batch, coefficient_N, strict=True)
                        ]
                    )
                )
        with run.seconds("weight_sync"):
            sync_weights(actor, engine)

        run.record(
            step,
            ledger_entries(config, step, rollouts, ppl_P, chosen, rewards_KG, entropy_N, weight_N),
            {
                **selection_metrics(ppl_P, chosen, window, rewards_KG),
                **rollout_metrics(
                    entropy_N,
                    weight_N,
                    lengths_N,
                    [rollout.finished for rollout in rollouts],
                    torch.cat([score.logprobs_T for score in scores]),
                    torch.cat([torch.tensor(rollout.engine_logprobs) for rollout in rollouts]),
                ),
                **{name: sum(u[name] for u in updates) / len(updates) for name in updates[0]},
            },
        )
        if due(step, config.eval.every) and step + 1 < config.train.total_steps:
            held_out("during", step + 1, config.eval.samples_during)
        if due(step, config.checkpoint.every) and step + 1 < config.train.total_steps:
            run.save(actor, step + 1)

    after = held_out("after", config.train.total_steps, config.eval.samples_per_prompt)
    run.save(actor, config.train.total_steps)
    run.export(actor)
    return run.finish(before, after)


def build_engine(config: Config, tokenizer) -> EmbeddedEngine:
    """The engine that `rollout.engine` names, still without weights."""
    return EmbeddedEngine(
        config.model.hf,
        tokenizer,
        dtype=DTYPES[config.model.dtype],
        device=parallel.device(),
        batch_size=config.rollout.batch_size,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        gather=parallel.gather_to_all,
    )


def scored_sequence(rollout: Rollout) -> ScoredSequence:
    """Prompt and completion; the completion is scored."""
    prompt = rollout.prompt.tokens
    return ScoredSequence(prompt + rollout.tokens, start=len(prompt))


def mini_batches(num_groups: int, group_size: int, count: int) -> list[list[int]]:
    """Rollouts of each optimizer update; groups stay whole and are dealt out in turn.

    In turn, because selected prompts come sorted by perplexity: every update sees the whole window.

    >>> mini_batches(3, 2, 2)
    [[0, 1, 4, 5], [2, 3]]
    """
    return [
        [k * group_size + g for k in range(first, num_groups, count) for g in range(group_size)]
        for first in range(count)
    ]


def weights_of(
    config: Config,
    entropy_N: torch.Tensor,
    lengths_N: torch.Tensor,
    rewards_KG: torch.Tensor,
    batch: Sequence[int],
) -> torch.Tensor:
    """The weights of one optimizer batch; its mean entropy is over that batch, on all ranks."""
    if config.weighting.method == "none":
        return torch.ones(len(batch), dtype=entropy_N.dtype)
    counts_N = None
    if not config.weighting.include_zero_variance:
        counts_N = ~zero_variance(rewards_KG).repeat_interleave(rewards_KG.shape[1])[batch]
    return relative_entropy_weights(
        entropy_N[batch],
        lengths_N[batch],
        mean=config.weighting.mean,
        clamp=config.weighting.clamp,
        counts_N=counts_N,
    )


def training_sequence(
    config: Config,
    rollout: Rollout,
    score: Scores,
    reference: Scores | None,
    *,
    advantage: float,
    coefficient: float,
) -> TrainingSequence:
    """A rollout as the actor's update takes it."""
    importance_T = None
    if config.loss.importance_cap is not None:
        importance_T = truncated_importance(
            score.logprobs_T, torch.tensor(rollout.engine_logprobs), config.loss.importance_cap
        )
    return TrainingSequence(
        sequence=scored_sequence(rollout),
        old_logprobs_T=score.logprobs_T,
        advantage=advantage,
        coefficient=coefficient,
        importance_T=importance_T,
        reference_logprobs_T=reference.logprobs_T if reference else None,
    )


def ledger_entries(
    config: Config, step: int, rollouts, ppl_P, chosen, rewards_KG, entropy_N, weight_N
) -> list[LedgerEntry]:
    """One entry a rollout of this step."""
    group_size = rewards_KG.shape[1]
    zero_variance_K = zero_variance(rewards_KG).tolist()
    return [
        LedgerEntry(
            step=step,
            prompt_id=rollout.prompt.id,
            sample=i % group_size,
            selector=config.selection.method,
            ppl=None if ppl_P is None else float(ppl_P[chosen[i // group_size]]),
            reward=float(rewards_KG.flatten()[i]),
            length=len(rollout.tokens),
            finished=rollout.finished,
            mean_entropy=float(entropy_N[i]),
            weight=float(weight_N[i]),
            zero_variance=zero_variance_K[i // group_size],
            weight_version=rollout.weight_version,
        )
        for i, rollout in enumerate(rollouts)
    ]


def due(step: int, every: int) -> bool:
    """Whether something periodic follows this step, counted from 0."""
    return every > 0 and (step + 1) % every == 0


class Run:
    """What the loop leaves behind: files, progress bar, totals.  Only rank 0 writes and shows."""

    def __init__(self, config: Config):
        self.config, self.directory = config, Path(config.run.dir)
        self.writes = dist.get_rank() == 0
        self.seconds = Stopwatch()
        self.rollouts = self.tokens = 0
        self.bar: tqdm | None = None
        if self.writes:
            run_directory.create(config)
            self.ledger = Ledger(self.directory / "ledger.jsonl")
            self.metrics = MetricsLog(
                self.directory / "metrics.jsonl",
                config.run.wandb_project,
                run_directory.to_tree(config),
            )
            self.evaluations = MetricsLog(self.directory / "evaluations.jsonl")
        dist.barrier(group=parallel.control_group())

    def say(self, sentence: str) -> None:
        """A line on the terminal, once."""
        if self.writes:
            print(sentence, file=sys.stderr)

    def steps(self):
        """The numbers of the steps, with a progress bar."""
        self.bar = tqdm(range(self.config.train.total_steps), "train", disable=not self.writes)
        yield from self.bar
        self.bar.close()

    def record(self, step: int, entries: Sequence[LedgerEntry], metrics: dict) -> None:
        """A step's ledger entries and metrics."""
        self.rollouts += len(entries)
        self.tokens += sum(entry.length for entry in entries)
        totals = {"rollout/paid": self.rollouts, "rollout/tokens_paid": self.tokens}
        seconds = {f"seconds/{name}": value for name, value in self.seconds.seconds.items()}
        if self.writes:
            self.ledger.append(entries)
            self.metrics.write(step, {**metrics, **totals, **seconds})
        self.bar.set_postfix(
            reward=f"{metrics['reward/mean']:.2f}",
            entropy=f"{metrics['entropy/mean']:.2f}",
            rollouts=self.rollouts,
        )

    def evaluate(self, engine, prompts, rewards_of, when: str, step: int, samples: int):
        """avg@k with the weights that the engine has; written and shown."""
        label = f"evaluate {when}"
        total = len(prompts) * samples
        with (
            self.seconds("evaluate"),
            tqdm(total=total, desc=label, leave=when != "during", disable=not self.writes) as bar,
        ):
            evaluation = evaluate(
                engine.generate,
                prompts,
                rewards_of,
                samples_per_prompt=samples,
                pass_reward=self.config.reward.high,
                temperature=self.config.eval.temperature,
                max_new_tokens=self.config.rollout.max_new_tokens,
                seed=f"{self.config.train.seed}/evaluation",
                on_progress=lambda n: bar.update(min(n, total - bar.n)),
            )
            bar.set_postfix(pass_rate=f"{evaluation.pass_rate:.3f}")
        if self.writes:
            self.evaluations.write(
                step,
                {
                    "rollouts": self.rollouts,
                    "pass_rate": evaluation.pass_rate,
                    "pass_rate_ci95": list(evaluation.ci95),
                    "samples_per_prompt": samples,
                },
            )
        return evaluation

    def save(self, actor: Actor, step: int) -> None:
        """A Megatron checkpoint."""
        with self.seconds("checkpoint"):
            actor.save(self.directory / "checkpoints", step=step)

    def export(self, actor: Actor) -> None:
        """The model in Hugging Face format."""
        with self.seconds("export"):
            save_hf(
                actor.hf_weights(), self.config.model.hf, self.directory / "hf", write=self.writes
            )

    def finish(self, before: Evaluation, after: Evaluation) -> dict:
        """Write the summary and the plot, and close the files."""
        gain_P = after.passes_P - before.passes_P
        summary = {
            "method": self.config.selection.method,
            "weighting": self.config.weighting.method,
            "steps": self.config.train.total_steps,
            "ranks": dist.get_world_size(),
            "pass_rate_before": before.pass_rate,
            "pass_rate_before_ci95": list(before.ci95),
            "pass_rate_after": after.pass_rate,
            "pass_rate_after_ci95": list(after.ci95),
            "gain": float(gain_P.mean()),
            "gain_ci95": list(mean_ci95(gain_P)),
            "held_out_prompts": len(after.passes_P),
            "samples_per_prompt": self.config.eval.samples_per_prompt,
            "rollouts": self.rollouts,
            "tokens": self.tokens,
            "seconds": {name: round(value, 2) for name, value in self.seconds.seconds.items()},
        }
        if self.writes:
            for log in (self.ledger, self.metrics, self.evaluations):
                log.close()
            run_directory.write_text(
                self.directory / "summary.json", json.dumps(summary, indent=2) + "\n"
            )
            report.plot(self.directory)
        return summary
