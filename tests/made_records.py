"""Records of a comparison that never ran: straight lines with known answers, and lifelike noise."""

import math

import numpy as np


def line(
    arm: str,
    seed: int,
    *,
    speed: float = 1.0,
    base: float = 0.4,
    final: float = 0.6,
    budget: int = 1000,
    points: int = 11,
    comparison: str = "lines",
    tokens_per_rollout: float = 20.0,
    **more,
) -> dict:
    """Return a record whose pass rate rises evenly, `speed` times as fast as from base to final,
    and then stays there."""
    x = np.linspace(0, budget, points)
    rate = np.minimum(base + speed * (final - base) * x / budget, final)
    return {
        "comparison": comparison,
        "arm": arm,
        "seed": seed,
        "evaluations": [
            {
                "step": i,
                "rollouts": float(x[i]),
                "tokens": float(x[i]) * tokens_per_rollout,
                "seconds": float(x[i]) / 10,
                "pass_rate": float(rate[i]),
                "samples_per_prompt": 4 if i in (0, points - 1) else 1,
            }
            for i in range(points)
        ],
        **more,
    }


LIFELIKE = {  # speed of learning, final pass rate, zero-variance ratio at the end, has perplexity
    "random": (1.0, 0.577, 0.56, False),
    "prepo": (1.5, 0.545, 0.50, True),
    "ppl_only": (1.3, 0.540, 0.51, True),
    "entropy_only": (1.0, 0.542, 0.51, False),
    "reverse": (0.9, 0.560, 0.56, True),
    "rho_max": (1.5, 0.565, 0.55, True),
    "clamp": (1.4, 0.559, 0.50, True),
    "entropy_clamp": (1.05, 0.585, 0.55, False),
    "dapo": (0.95, 0.594, 0.49, False),
    "greso": (0.95, 0.590, 0.38, False),
    "mopps": (1.4, 0.585, 0.36, False),
    "foresight": (1.8, 0.595, 0.33, True),
    "oracle": (2.2, 0.611, 0.27, True),
}
"""Shapes like those once measured on the laptop task."""

STEPS, GROUP, K, P = 80, 8, 32, 160


def lifelike(arm: str, seed: int, comparison: str = "made up", budget: int = 20_480) -> dict:
    """Return a record such as `run_record.record` makes, with noise; nothing in it was measured."""
    speed, final, zero_variance, has_ppl = LIFELIKE.get(arm, (1.2, 0.58, 0.4, True))
    random = np.random.default_rng([seed, *arm.encode()])
    refills = arm in ("dapo", "greso")
    steps = int(STEPS * 0.6) if refills else STEPS
    end = final + random.normal(0, 0.008)
    evaluations = []
    for i, step in enumerate(range(0, steps + 1, 5 if not refills else 4)):
        share = step / steps
        rate = 0.41 + (end - 0.41) * (1 - math.exp(-4 * speed * share)) / (1 - math.exp(-4 * speed))
        exact = i == 0 or step == steps
        rollouts = round(budget * share)
        evaluations.append(
            {
                "step": step,
                "rollouts": rollouts,
                "tokens": round(rollouts * (16 + 4 * share)),
                "seconds": round(80 * share * (1.25 if has_ppl else 1.0), 1),
                "pass_rate": round(rate + random.normal(0, 0.006 if exact else 0.014), 4),
                "samples_per_prompt": 4 if exact else 1,
            }
        )
    probes = 0
    if arm == "oracle":
        for e in evaluations:
            e["probes"] = e["step"] * P * GROUP
            e["probe_tokens"], e["probe_seconds"] = e["probes"] * 18, e["step"] * 4.0
            e["rollouts"] += e["probes"]
            e["tokens"] += e["probe_tokens"]
            e["seconds"] += e["probe_seconds"]
        probes = evaluations[-1]["probes"]
    share = np.linspace(0, 1, 40)

    def series(start: float, stop: float, noise: float) -> list[float]:
        return [
            round(float(v), 4) for v in start + (stop - start) * share + random.normal(0, noise, 40)
        ]

    def total(last: float) -> list[float]:
        return [round(float(v)) for v in np.linspace(last / 40, last, 40)]

    columns = {
        "step/every": math.ceil(steps / 40),
        "reward/mean": series(0.5, 0.6, 0.03),
        "reward/zero_variance_ratio": series(0.4 if arm != "oracle" else 0.08, zero_variance, 0.05),
        "entropy/mean": series(0.21, 0.12, 0.008),
        "rollout/length": series(16, 20, 0.3),
        "rollout/paid": total(evaluations[-1]["rollouts"]),
        "rollout/tokens_paid": total(evaluations[-1]["tokens"]),
        "loss/grad_norm": series(0.4, 0.3, 0.05),
        "weight/std": series(0.7, 1.1, 0.1),
        "weight/max": series(3, 6, 1.0),
    }
    if has_ppl:
        first, last = (1.4, 2.4) if arm != "reverse" else (2.4, 1.4)
        columns |= {
            "ppl/selected/mean": series(first, last, 0.02),
            "ppl/candidates/q50": series(1.75, 1.85, 0.01),
            "ppl/spearman_with_reward": series(-0.4, -0.3, 0.12),
        }
    falling = [0.82, 0.55, 0.43, 0.38, 0.33, 0.31, 0.43, 0.31, 0.26, 0.14]
    noisy = [round(v + random.normal(0, 0.02), 4) for v in falling]
    return {
        "comparison": comparison,
        "arm": arm,
        "seed": seed,
        "command": "megatron-prepo compare examples/laptop/prepo.yaml --methods random,prepo "
        "--seeds 1-4 --dir runs/compare/laptop",
        "overrides": [],
        "config_hash": "0" * 16,
        "settings": {"train.total_steps": STEPS, "selection.num_selected": K},
        "machine": {"processor": "made up", "cores": 2, "gpu": "none", "torch": "2.13.0"},
        "summary": {"steps": steps, "ranks": 1, "held_out_prompts": 400, "samples_per_prompt": 4},
        "evaluations": evaluations,
        "probes": probes,
        "steps": columns,
        "ppl_deciles": noisy if has_ppl else None,
        "candidates_ppl_deciles": noisy if arm == "oracle" else None,
        "seconds": {
            "setup": 3.1,
            "evaluate": 14.0,
            "perplexity": 11.0 if has_ppl else 0.0,
            "probes": 300.0 if arm == "oracle" else 0.0,
            "rollouts": 30.0,
            "rewards": 0.4,
            "old_logprobs": 9.0,
            "update": 28.0,
            "weight_sync": 1.5,
            "checkpoint": 0.3,
            "export": 0.2,
        },
    }
