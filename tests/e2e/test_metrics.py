"""All numbers of a step in `metrics.jsonl`, computed again from the step's dump.

They are computed by `transformers` from the dumped weights, and from the dumped tokens, rewards and
engine's log-probabilities, on two data-parallel ranks; `test_training.py` shows that layouts agree.
"""

import json
import math

import numpy as np
import pandas
import pytest
import torch
from rounding import approx
from scipy import stats
from transformers import AutoModelForCausalLM

from checkpoints_convert.convert import export_hf
from megatron_prepo import config as configuration
from megatron_prepo.debug import dump
from megatron_prepo.inputs import preflight
from tests.e2e.laptop import LAPTOP, SHORT, made_by_ranks, metrics

LAYOUT = ["parallel.tensor=1", "parallel.data=2", "train.share_prefixes=false"]
WARMUP = ["optimizer.lr=8e-4", "optimizer.lr_warmup_steps=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("measured") / "run"
    settings = [*SHORT, *LAYOUT, *WARMUP, "debug.dump_steps=[1]"]
    return made_by_ranks(directory, *settings, num_ranks=2)


def scores(model, tokens: tuple[int, ...], start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and entropies of a sequence's tokens from `start` on."""
    with torch.no_grad():
        logp_TV = model(torch.tensor([tokens])).logits[0, start - 1 : -1].log_softmax(-1)
    chosen_T = torch.tensor(tokens[start:])
    return logp_TV.gather(1, chosen_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


def spread(name: str, values) -> dict[str, float]:
    values = np.asarray(values, dtype=np.float64)
    points = {"min": 0, "q25": 25, "q50": 50, "q75": 75, "max": 100}
    return {f"{name}/{label}": np.percentile(values, q) for label, q in points.items()}


def by_the_model(run, dtype: torch.dtype, folders) -> dict[str, float]:
    """Return what needs the weights before each of the step's two updates, in one precision."""
    before, between = (AutoModelForCausalLM.from_pretrained(f, dtype=dtype) for f in folders)
    of = dump.read(run / "dumps" / "step_0001")
    config = configuration.load(run / "config.yaml")
    tokenizer = preflight.read_tokenizer(config.model.hf)
    tokens_of = {
        p.id: p.tokens
        for p in preflight.load_prompts(config.data, config.run, tokenizer, config.data.train, [])
    }
    ids = [candidate["id"] for candidate in of.about["candidates"]]
    ppl = {i: float(torch.exp(-scores(before, tokens_of[i], 1)[0].mean())) for i in ids}
    rewards = pandas.DataFrame({"id": [r.prompt.id for r in of.rollouts], "reward": of.rewards_N})
    by_prompt = rewards.groupby("id").reward
    chosen = list(by_prompt.mean().index)
    found = spread("ppl/candidates", list(ppl.values()))
    found |= spread("ppl/selected", [ppl[i] for i in chosen])
    found["ppl/selected/mean"] = np.mean([ppl[i] for i in chosen])
    pairs = [ppl[i] for i in chosen], by_prompt.mean().to_numpy()
    found["ppl/spearman_with_reward"] = stats.spearmanr(*pairs).statistic

    old, entropy, losses, ratios = [], [], [], []
    for s in of.batch:
        logprobs_T, entropy_T = scores(before, s.sequence.tokens, s.sequence.start)
        old.append(logprobs_T)
        entropy.append(entropy_T)
    mean_N = np.array([e_T.double().mean() for e_T in entropy])
    lengths_N = np.array([len(e_T) for e_T in entropy])
    found["entropy/mean"] = (mean_N * lengths_N).sum() / lengths_N.sum()
    found |= spread("entropy/sequence", mean_N)
    deviation = by_prompt.transform("std") + config.advantage.eps
    advantage_N = ((rewards.reward - by_prompt.transform("mean")) / deviation).fillna(0)
    weight_N, first = [], 0
    for number, result in enumerate(of.about["results"]):
        part = slice(first, first := first + result["rollouts"])
        weight_N += list(mean_N[part] / mean_N[part].mean())
        loss, sums, model = 0.0, np.zeros(4), (before, between)[number]
        for i in range(*part.indices(len(old))):
            sequence = of.batch[i].sequence
            now_T = scores(model, sequence.tokens, sequence.start)[0]
            log_ratio_T, a = (now_T - old[i]).double(), advantage_N[i]
            ratio_T = log_ratio_T.exp()
            clipped_T = ratio_T.clamp(1 - config.loss.clip_low, 1 + config.loss.clip_high)
            share = weight_N[i] / result["rollouts"]
            loss -= share * float(torch.minimum(ratio_T * a, clipped_T * a).sum())
            if a:
                cut = float((clipped_T * a < ratio_T * a).sum())
                kl = float((ratio_T - 1 - log_ratio_T).sum())  # k3 of the old against the new
                sums += [len(ratio_T), float(ratio_T.sum()), kl, cut]
        losses.append(loss)
        if sums[0]:
            ratios.append(sums[1:] / sums[0])
    found["loss/policy"] = np.mean(losses)
    names = ("loss/ratio", "loss/kl_to_old", "loss/clip_fraction")
    found |= dict(zip(names, np.mean(ratios, axis=0), strict=True))
    found |= spread("weight", weight_N)
    return found | {"weight/mean": np.mean(weight_N), "weight/std": np.std(weight_N, ddof=1)}


def by_the_dump(run) -> dict[str, float]:
    """Return what follows from the dumped numbers alone."""
    of = dump.read(run / "dumps" / "step_0001")
    engine = of.per_rollout("engine_logprobs_T")
    difference_N = [
        e_T.double().numpy() - s.old_logprobs_T.double().numpy()
        for e_T, s in zip(engine, of.batch, strict=True)
    ]
    off_T, log_ratio_N = np.concatenate(difference_N), [-d_T.sum() for d_T in difference_N]

    def share(log_ratios) -> float:
        ratios = np.exp(np.asarray(log_ratios))
        return ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum())

    ledger = pandas.read_json(run / "ledger.jsonl", lines=True)
    step = ledger[ledger.step == 1]
    rewards = pandas.Series(of.rewards_N.numpy()).groupby([r.prompt.id for r in of.rollouts])
    learnt = [s for s in of.batch if s.advantage]
    norms = []
    for number in range(2):
        gradient = dump.load_file(
            run / "dumps" / "step_0001" / f"gradients_{number}" / "model.safetensors"
        )
        norms.append(math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient.values())))
    found = {
        "step": 1,
        "reward/mean": float(of.rewards_N.double().mean()),
        "reward/zero_variance_ratio": float((rewards.nunique() == 1).mean()),
        "reward/failed_ratio": 0,
        "selection/groups_paid": 8,
        "selection/window_first": 16,
        "selection/window_last": 23,
        "rollout/length": step.length.mean(),
        "rollout/finished_ratio": step.finished.mean(),
        "rollout/staleness": 0,
        "rollout/paid": len(ledger),
        "rollout/tokens_paid": ledger.length.sum(),
        "mismatch/kl": float((np.exp(-off_T) - 1 + off_T).mean()),
        "mismatch/logprob_abs/mean": np.abs(off_T).mean(),
        "mismatch/token_ess": share(-off_T),
        "mismatch/sequence_ess": share(log_ratio_N),
        **spread("mismatch/sequence_log_ratio", log_ratio_N),
        "loss/grad_norm": np.mean(norms),
        # updates 2 and 3 of 4 in the warm-up
        "loss/learning_rate": 8e-4 * np.mean([3 / 4, 4 / 4]),
        "loss/skipped_updates": 0,
        "train/tokens": sum(len(s.sequence.tokens) - 1 for s in learnt) / 2,
        "train/padding_fraction": 0,
    }
    for label, q in (("q50", 50), ("q90", 90), ("q99", 99), ("max", 100)):
        rank = max(1, math.ceil(q * len(off_T) / 100))
        found[f"mismatch/logprob_abs/{label}"] = np.sort(np.abs(off_T))[rank - 1]
    for bound in ("0.01", "0.1", "1"):
        found[f"mismatch/share_off_by_{bound}"] = (np.abs(off_T) > float(bound)).mean()
    return found


@pytest.fixture(scope="module")
def step(run):
    return metrics(run)[1]


@pytest.fixture(scope="module")
def by_transformers(run, tmp_path_factory):
    """The numbers in float64 and in float32."""
    folders = [tmp_path_factory.mktemp("exported") / name for name in ("before", "between")]
    for number, folder in enumerate(folders):
        export_hf(run / "dumps" / "step_0001" / f"weights_{number}", folder, hf=LAPTOP / "base")
    return [by_the_model(run, dtype, folders) for dtype in (torch.float64, torch.float32)]


def test_numbers_of_the_model_are_those_of_transformers(step, by_transformers):
    """The difference is at most ten times the error of `transformers` in float32; less where its
    error is small by chance.

    Where its own error is below a float32's resolution of numbers of the key's kind, that is the
    unit: log-probabilities of magnitude 4 or less, hence 4 * 2^-23, in each of a mean's terms.
    """
    exact, rounded = by_transformers
    for name, value in exact.items():
        unit = max(abs(value), 1.0) * 4 * 2**-23
        allowed = 10 * max(abs(rounded[name] - value), unit)
        assert abs(step[name] - value) <= allowed, (name, step[name], value)
    assert exact["loss/kl_to_old"] > 1e-4 and exact["weight/std"] > 0.01, "they tell nothing"


def test_all_other_numbers_follow_from_the_dump(run, step):
    """Sums of float64 are in another order; the norm is a sum of a million squares in float32."""
    expected = by_the_dump(run)
    for name, value in expected.items():
        singles = name in ("loss/grad_norm", "reward/mean")
        dtype = torch.float32 if singles else torch.float64
        # a norm has no terms that cancel; sums of float64 have some of size 1
        assert step[name] == approx(value, dtype=dtype, scale=0.0 if singles else 1.0), name


def test_no_number_is_without_a_test(run, step, by_transformers):
    """Seconds are excluded; rates times seconds are in `test_training.py`."""
    known = {*by_transformers[0], *by_the_dump(run)}
    left = {name for name in step if not name.startswith(("seconds/", "speed/"))} - known
    assert left == {"train/balance_ratio"}
    assert 1 <= step["train/balance_ratio"] < 2
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
