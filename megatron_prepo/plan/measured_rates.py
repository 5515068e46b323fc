"""Rates of a finished run of one's own: `megatron-prepo plan CONFIG --rates RUN`.

They take the place of the published ones (`gpus`), from the medians of `metrics.jsonl` without the
first step, which warms up.  A rate is active parameters times tokens, a second and GPU, as there.
"""

import json
from pathlib import Path
from statistics import median

from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.plan.gpus import DEVICE_NAMES, MeasuredRates, bubble


def read_rates(directory: str | Path) -> MeasuredRates:
    """The rates of a run.

    Raises UserError for one that has not ended, has one step only, had its engine on GPUs that are
    not counted, or ran on a device whose peaks are not known, from which nothing could be scaled.
    """
    from megatron_prepo.plan import planner as plan

    directory = Path(directory)
    for name in ("config.yaml", "summary.json", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise UserError(f"--rates {directory}: no {name}; give the directory of a finished run")
    summary = json.loads((directory / "summary.json").read_text())
    device, ranks = summary["machine"]["gpu"], summary["ranks"]
    if device not in DEVICE_NAMES:
        raise UserError(
            f"--rates {directory}: it ran on GPU {device!r}, and rates are scaled from one of "
            f"{', '.join(DEVICE_NAMES)} only"
        )
    config = configuration.load(directory / "config.yaml")
    if config.servers.urls:
        raise UserError(
            f"--rates {directory}: servers.urls were on GPUs that the run did not count; give a "
            "run whose engine was on its own"
        )
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    counted = plan.make_plan(config, plan.PlanRequest(gpus=ranks, gpu=DEVICE_NAMES[device]))
    parallel, active = config.parallel, counted.active_parameters
    # a prediction adds what its own pipeline idles, so the run's is taken out
    idle = bubble(parallel.pipeline, counted.micro_batches, parallel.virtual_pipeline)

    def middle(value) -> float:
        values = [value(step) for step in steps[1:] if "speed/update_tokens" in step]
        if not values:
            raise UserError(f"--rates {directory}: no step behind the first has learnt anything")
        return median(values)

    return MeasuredRates(
        parameters=counted.parameters,
        gpu=DEVICE_NAMES[device],
        rates={
            "rollouts": active
            * middle(lambda step: step["rollout/tokens_paid"] / step["seconds/rollouts"])
            / ranks,
            "old_logprobs": active * idle * middle(lambda step: step["speed/old_logprobs_tokens"]),
            "update": active * idle * middle(lambda step: step["speed/update_tokens"]),
        },
        seconds={"weight_sync": middle(lambda step: step["seconds/weight_sync"])},
        source=f"measured: {counted.model} on {ranks} {DEVICE_NAMES[device]} ({directory})",
    )
