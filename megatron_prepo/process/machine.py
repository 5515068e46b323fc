"""Description of the machine and its versions, recorded with measurements."""

import os
import platform
from importlib import metadata
from pathlib import Path


def describe() -> dict[str, str | int]:
    """Return processor, cores, GPU if any, and the versions of the main libraries."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 0,
        "gpu": gpu,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "megatron-core", "transformers")},
    }


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
