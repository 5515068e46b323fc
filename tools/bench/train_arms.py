"""Run one trainer in a separate process, which executes tasks and reports their times.

    python tools/bench/train_arms.py ARM MODE CASE [setting=value ...]

Each line on stdin names a task; the response is one line of JSON on stdout.  MODE `fixed`: every
trainer gets the case's rollouts; tasks `score` (log-probabilities and entropies, no gradient) and
`update` (one optimizer update).  MODE `loop`: the trainer's loop; task `step` is one step of it.

| ARM | trainer |
|---|---|
| `ours` | this repository's actor; in `loop`, its training loop, paused between steps |
| `trl` | TRL's GRPOTrainer and its loop; rollouts are passed by `rollout_func` |
| `plain` | a straightforward loop in plain PyTorch around the `transformers` model |

Each has one thread, and seconds are CPU time of this process, which other processes of a shared
machine affect little.  The measured methods of TRL are not public: they are those of trl 1.16.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_prepo.rewards.final_number import final_number
from tools.bench.train_case import Case, Group, read


class Orders:
    """Tasks from stdin and results to stdout; all other output goes to stderr."""

    def __init__(self):
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.seconds: dict[str, float] = defaultdict(float)
        self.started_with, self._wall = None, 0.0

    def next(self) -> str:
        """Return the next task; exits the process at the end of stdin."""
        self.started_with = self.started_with or _memory("VmRSS")
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # from any place in a trainer's loop
        self.seconds.clear()
        self._wall = time.perf_counter()
        return line.strip()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Measure seconds of a part of the task; repeated parts add up."""
        start = time.process_time()
        yield
        self.seconds[stage] += time.process_time() - start

    def answer(self, **values) -> None:
        """Write the result of the task, with seconds and memory."""
        values["wall"] = time.perf_counter() - self._wall
        memory = {"resident_before": self.started_with, "resident_peak": _memory("VmHWM")}
        self._answers.write(json.dumps({"seconds": self.seconds, **memory, **values}) + "\n")
        self._answers.flush()


def _memory(name: str) -> int:
    """Return a number of bytes from Linux's statistics of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} in /proc/self/status")


def ours_fixed(case: Case, orders: Orders) -> None:
    """Run `Actor.score` and `Actor.update` like `train.py`."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.rewards.pool import Grade
    from megatron_prepo.trainer.groups import Groups
    from megatron_prepo.trainer.policy_update import (
        TrainingBatch,
        score_rollouts,
        step_advantages,
        update_policy,
        weigh_by_entropy,
    )

    config = case.config
    parallel.initialize(config.parallel, config.train.seed)
    actor = Actor(config)
    num_mini_batches, loss = config.train.mini_batches, config.loss
    grades = [Grade(reward) for group in case.groups for reward in group.rewards]
    while task := orders.next():
        rollouts = case.rollouts(actor.updates)
        with orders.timed("score"):
            old = score_rollouts(actor, rollouts, temperature=config.rollout.temperature, loss=loss)
        values = {"logprob": float(torch.cat([s.logprobs_T for s in old.scores]).mean())}
        if task == "update":
            orders.seconds.clear()
            with orders.timed("update"):
                groups = Groups().extend(range(len(case.groups)), rollouts, grades)
                advantage_N, advantages_T = step_advantages(config.advantage, loss, groups, old)
                weight_N = weigh_by_entropy(config.weighting, groups, old, num_mini_batches)
                metrics = update_policy(
                    actor,
                    TrainingBatch(groups, advantage_N, old, weight_N, advantages_T),
                    aggregation=loss.aggregation,
                    num_mini_batches=num_mini_batches,
                    max_tokens=config.rollout.max_new_tokens,
                )
            values |= {"loss": metrics["loss/policy"], "grad_norm": metrics["loss/grad_norm"]}
        orders.answer(**values)


def ours_loop(case: Case, orders: Orders) -> None:
    """Run `train`, which continues with each task."""
    from megatron_prepo.run.recorder import Run
    from megatron_prepo.train import train
    from megatron_prepo.trainer import step_metrics as metrics

    steps = Run.steps

    def told_when(run: Run) -> Iterator[int]:
        for step in steps(run):
            orders.next()
            spent, paid = dict(run.seconds.total), run.tokens
            with orders.timed("step"):
                yield step
            for stage, total in run.seconds.total.items():
                orders.seconds[stage] = total - spent.get(stage, 0.0)
            last = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[-1])
            scored = last["speed/old_logprobs_tokens"] * last["seconds/old_logprobs"]
            completions = run.tokens - paid
            orders.answer(prompt_tokens=round(scored) - completions, completion_tokens=completions)

    clock = mock.Mock(perf_counter=time.process_time)
    with mock.patch.object(Run, "steps", told_when), mock.patch.object(metrics, "time", clock):
        train(case.config)


def trl(case: Case, orders: Orders, *, fixed: bool) -> None:
    """Run GRPOTrainer with settings that make its loss ours; `fixed` passes the rollouts."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config = case.config
    micro, size = case.rows, config.rollout.samples_per_prompt
    groups = {group.text: group for group in case.groups}

    class Timed(GRPOTrainer):
        def _generate(self, prompts):
            with orders.timed("generate"):
                return super()._generate(prompts)

        def _generate_and_score_completions(self, inputs):
            with orders.timed("before_update"):
                return super()._generate_and_score_completions(inputs)

    class Told(TrainerCallback):
        def on_step_begin(self, *_, **__):
            while orders.next() == "score":
                with orders.timed("score"):
                    logprob = score()
                orders.answer(logprob=logprob)
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            seconds = orders.seconds
            seconds["step"] = time.process_time() - self.start
            seconds["update"] = seconds["step"] - seconds["before_update"]

        def on_log(self, args, state, control, logs, **_):
            if "grad_norm" in logs:  # the last one, for the entire run, has none
                orders.answer(
                    loss=logs["loss"],
                    grad_norm=logs["grad_norm"],
                    completion_tokens=logs["completions/mean_length"] * size * len(groups),
                )

    def given(prompts: list[str], _) -> dict:
        taken: dict[str, int] = defaultdict(int)
        completions = []
        for text in prompts:
            completions.append(groups[text].completions[taken[text]])
            taken[text] += 1
        return {
            "prompt_ids": [groups[text].prompt for text in prompts],
            "completion_ids": completions,
            "logprobs": None,
        }

    def reward(prompts, completions, **_) -> list[float]:
        if not fixed:
            return [final_number(c, groups[p].answer) for p, c in zip(prompts, completions)]
        taken: dict[str, int] = defaultdict(int)
        rewards = []
        for text in prompts:
            rewards.append(groups[text].rewards[taken[text]])
            taken[text] += 1
        return rewards

    optimizer = config.optimizer
    tokenizer = AutoTokenizer.from_pretrained(config.model.hf)
    trainer = Timed(
        model=config.model.hf,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": text} for text in groups]),
        processing_class=tokenizer,
        rollout_func=given if fixed else None,
        callbacks=[Told()],
        args=GRPOConfig(
            output_dir=config.run.dir,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=len(groups) * size // micro,
            num_generations=size,
            max_completion_length=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            loss_type="dapo",
            epsilon=config.loss.clip_low,
            epsilon_high=config.loss.clip_high,
            learning_rate=optimizer.lr,
            lr_scheduler_type="constant",
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_epsilon=optimizer.adam_eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.clip_grad,
            max_steps=10**6,
            shuffle_dataset=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    padded = _left_and_right(case, tokenizer.pad_token_id)

    @torch.no_grad()
    def score() -> float:
        ids_NS, mask_NS, scored_NC = padded
        logprobs_NC, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids_NS,
            mask_NS,
            scored_NC.shape[1],
            batch_size=micro,
            compute_entropy=True,
        )
        return float(logprobs_NC[scored_NC].mean())

    trainer.train()


def plain_fixed(case: Case, orders: Orders) -> None:
    """Run micro-batches of similar lengths, padded on the right; the head only on completions."""
    model, optimizer = _plain_model(case)
    while task := orders.next():
        batches = list(_plain_batches(case))
        if task == "score":
            with orders.timed("score"), torch.no_grad():
                parts = [_plain_scores(model, batch) for batch in batches]
            logprob = torch.cat([logprobs_T for logprobs_T, _ in parts]).mean()
            orders.answer(logprob=float(logprob))
        else:
            with orders.timed("update"):
                values = _plain_update(case, model, optimizer, batches)
            orders.answer(**values)


def plain_loop(case: Case, orders: Orders) -> None:
    """Run `generate` of `transformers`, our reward function, and one update."""
    from transformers import AutoTokenizer

    model, optimizer = _plain_model(case)
    tokenizer = AutoTokenizer.from_pretrained(case.config.model.hf)
    config, size = case.config, case.config.rollout.samples_per_prompt
    while orders.next():
        with orders.timed("step"):
            with orders.timed("generate"):
                tokenizer.padding_side = "left"
                texts = [group.text for group in case.groups for _ in range(size)]
                inputs = tokenizer(texts, return_tensors="pt", padding=True)
                out = model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=config.rollout.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=config.rollout.max_new_tokens,
                )
            new = out[:, inputs["input_ids"].shape[1] :]
            completions = [_until(row, tokenizer.eos_token_id) for row in new.tolist()]
            graded = [
                final_number(tokenizer.decode(c, skip_special_tokens=True), group.answer)
                for c, group in zip(completions, (g for g in case.groups for _ in range(size)))
            ]
            made = [
                Group(
                    group.text,
                    group.answer,
                    group.prompt,
                    completions[k * size : (k + 1) * size],
                    graded[k * size : (k + 1) * size],
                )
                for k, group in enumerate(case.groups)
            ]
            made_case = replace(case, groups=made)
            with orders.timed("update"):
                _plain_update(made_case, model, optimizer, list(_plain_batches(made_case)))
        orders.answer(completion_tokens=sum(map(len, completions)))


def _plain_model(case: Case):
    from transformers import AutoModelForCausalLM

    settings = case.config.optimizer
    model = AutoModelForCausalLM.from_pretrained(case.config.model.hf, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
    )
    return model, optimizer


def _plain_batches(case: Case) -> Iterator[tuple]:
    """Return (ids_BS, mask_BS, scored_BS, advantage_B) with rows sorted by length."""
    micro = case.rows
    rewards_KG = torch.tensor([group.rewards for group in case.groups])
    std_K1 = rewards_KG.std(1, keepdim=True) + case.config.advantage.eps
    advantage_N = ((rewards_KG - rewards_KG.mean(1, keepdim=True)) / std_K1).flatten()
    rows = [(group.prompt, c) for group in case.groups for c in group.completions]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for first in range(0, len(order), micro):
        index = order[first : first + micro]
        width = max(len(rows[i][0]) + len(rows[i][1]) for i in index)
        ids_BS = torch.zeros(len(index), width, dtype=torch.long)
        mask_BS, scored_BS = torch.zeros_like(ids_BS), torch.zeros_like(ids_BS, dtype=torch.bool)
        for b, i in enumerate(index):
            prompt, completion = rows[i]
            end = len(prompt) + len(completion)
            ids_BS[b, :end] = torch.tensor(prompt + completion)
            mask_BS[b, :end] = 1
            scored_BS[b, len(prompt) : end] = True
        yield ids_BS, mask_BS, scored_BS, advantage_N[index]


def _plain_scores(model, batch: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and entropies of the scored tokens, row by row."""
    ids_BS, mask_BS, scored_BS, _ = batch
    hidden_BSH = model.model(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
    logits_TV = model.lm_head(hidden_BSH[:, :-1][scored_BS[:, 1:]])
    logprobs_TV = logits_TV.log_softmax(-1)
    targets_T = ids_BS[scored_BS]
    entropy_T = -(logprobs_TV.detach().exp() * logprobs_TV.detach()).sum(-1)
    return logprobs_TV.gather(1, targets_T[:, None])[:, 0], entropy_T


def _plain_update(case: Case, model, optimizer, batches: list[tuple]) -> dict[str, float]:
    """Make one on-policy update: the ratio is 1 and carries the gradient, as in TRL."""
    loss_of, clip = case.config.loss, case.config.optimizer.clip_grad
    num_scored = sum(int(batch[2].sum()) for batch in batches)
    optimizer.zero_grad()
    total = 0.0
    for batch in batches:
        logprobs_T, _ = _plain_scores(model, batch)
        advantage_T = batch[3].repeat_interleave(batch[2].sum(1))
        ratio_T = (logprobs_T - logprobs_T.detach()).exp()
        clipped_T = ratio_T.clamp(1 - loss_of.clip_low, 1 + loss_of.clip_high)
        objective_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
        loss = -objective_T.sum() / num_scored
        loss.backward()
        total += float(loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return {"loss": total, "grad_norm": float(grad_norm)}


def _left_and_right(case: Case, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad like TRL: prompts on the left, completions on the right, all to the longest."""
    rows = [(group.prompt, c) for group in case.groups for c in group.completions]
    before, after = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids_NS = torch.full((len(rows), before + after), pad)
    mask_NS = torch.zeros_like(ids_NS)
    for n, (prompt, completion) in enumerate(rows):
        here = slice(before - len(prompt), before + len(completion))
        ids_NS[n, here] = torch.tensor(prompt + completion)
        mask_NS[n, here] = 1
    return ids_NS, mask_NS, mask_NS[:, before:].bool()


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


ARMS = {
    ("ours", "fixed"): ours_fixed,
    ("ours", "loop"): ours_loop,
    ("trl", "fixed"): lambda case, orders: trl(case, orders, fixed=True),
    ("trl", "loop"): lambda case, orders: trl(case, orders, fixed=False),
    ("plain", "fixed"): plain_fixed,
    ("plain", "loop"): plain_loop,
}


def main() -> None:
    """Execute tasks until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("arm", choices=sorted({arm for arm, _ in ARMS}))
    parser.add_argument("mode", choices=["fixed", "loop"])
    parser.add_argument("case", help="folder that tools/bench/train.py has written")
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    options = parser.parse_args()
    orders = Orders()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    ARMS[options.arm, options.mode](read(options.case, options.settings), orders)


if __name__ == "__main__":
    main()
