"""Write adapters as a directory that `peft` loads: `adapter_config.json` and their matrices."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_prepo.config import LoraConfig
from megatron_prepo.files import ownership
from megatron_prepo.files.atomic import naming
from megatron_prepo.models.hf_files import ADAPTER
from megatron_prepo.models.megatron_to_hf import adapter_weights

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What `peft` puts before the names of a model's tensors."""
KIND = "adapter"
"""Kind of the directory in its marker (`ownership.py`)."""


def save_peft(
    chunks: Sequence[torch.nn.Module],
    lora: LoraConfig,
    directory: str | Path,
    *,
    base: str,
    revision: str | None,
    write: bool,
) -> None:
    """Write the adapters of a Megatron model; collective, one rank writes.

    `base`, `revision`: the model that they were trained for, which `peft` loads them onto, as its
    absolute path or as its name and commit on the hub.
    """
    tensors = {
        PREFIX + name: tensor.cpu().clone()
        for name, tensor in adapter_weights(chunks)
        if write and name.split(".")[-3] in lora.target_modules
    }
    if not write:
        return
    aside = ownership.begin(directory)
    try:
        with naming(aside / WEIGHTS):
            save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps(peft_config(lora, base, revision), indent=2) + "\n"
            (aside / ADAPTER).write_text(text, encoding="utf-8")
        ownership.publish(aside, directory, KIND)
    except BaseException:
        ownership.abandon(aside)
        raise


def peft_config(lora: LoraConfig, base: str, revision: str | None) -> dict[str, object]:
    """Return the content of `adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
