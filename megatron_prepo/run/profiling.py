"""Traces of selected steps: `profile.steps=[3,4]`, for chrome://tracing, Perfetto and TensorBoard.

Stages have the same names as under `seconds/`.  Megatron's own ranges are enabled during these
steps; like the stages they are NVTX ranges, which Nsight Systems shows
(`nsys profile -t cuda,nvtx`).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_prepo.config import ProfileConfig


@contextlib.contextmanager
def profiled(config: ProfileConfig, step: int, rank: int, directory: Path) -> Iterator[None]:
    """Trace the body to `directory/profile/step_S_rank_R.json.gz` if step and rank are selected."""
    if step not in config.steps or rank not in config.ranks:
        yield
        return
    from megatron.core.utils import configure_nvtx_profiling

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    (directory / "profile").mkdir(parents=True, exist_ok=True)
    configure_nvtx_profiling(True)
    try:
        with profile(activities=activities, record_shapes=True, with_stack=config.stacks) as trace:
            yield
    finally:
        configure_nvtx_profiling(False)
    trace.export_chrome_trace(str(directory / "profile" / f"step_{step}_rank_{rank}.json.gz"))
