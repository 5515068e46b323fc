"""Rates of a finished run: `megatron-prepo plan CONFIG --rates RUN`.

They replace the published ones (`step_time`) and are medians over the steps in `metrics.jsonl`,
without the first, which warms up.  A rate is active parameters times tokens, per second and GPU.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from megatron_prepo import config as configuration
from megatron_prepo.errors import UserError
from megatron_prepo.plan.gpus import DEVICE_NAMES
from megatron_prepo.plan.step_time import MeasuredRates, bubble
from megatron_prepo.run.metrics_table import read_steps


def read_rates(directory: str | Path) -> MeasuredRates:
    """Return the rates of a run.

    Raises UserError for a run that is not finished, has only one step, had its engine on GPUs that
    it does not count, or ran on a device without known peaks, whose rates could not be scaled.
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
            f"--rates {directory}: it ran on GPU {device!r}, and rates can only be scaled from one "
            f"of {', '.join(DEVICE_NAMES)}"
        )
    config = configuration.load(directory / "config.yaml")
    if config.servers.urls:
        raise UserError(
            f"--rates {directory}: servers.urls were on GPUs that the run did not count; give a "
            "run whose engine used the run's GPUs"
        )
    steps = list(read_steps(directory))
    counted = plan.make_plan(config, plan.PlanRequest(gpus=ranks, gpu=DEVICE_NAMES[device]))
    parallel, active = config.parallel, counted.active_parameters
    # a prediction adds the idle time of its pipeline, so that of the run is removed
    idle = bubble(parallel.pipeline, counted.micro_batches, parallel.virtual_pipeline)

    def middle(value: Callable[[dict[str, Any]], float]) -> float:
        values = [value(step) for step in steps[1:] if "speed/update_tokens" in step]
        if not values:
            raise UserError(f"--rates {directory}: no step after the first has trained on anything")
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
