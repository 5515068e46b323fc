"""A tiny random model with the settings of a `config.json`, in Megatron-Core and in `transformers`.

Only the sizes in the file are reduced, so that a setting that the two interpret differently changes
the logits within a second, whatever the size of the model.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_prepo.errors import UserError
from megatron_prepo.models.float64 import computing_in_float64
from megatron_prepo.models.hf_config import read_hf_config, read_json, sliding_window
from megatron_prepo.models.hf_files import SINGLE

POSITIONS = 2048
"""Range of token positions: a missing rope scaling is visible only over thousands of positions."""
TOKENS = 64
FACTOR = 8
"""Maximum ratio of the difference to that between `transformers` in float32 and in float64."""


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences of logits."""

    ours: float
    """Difference between Megatron-Core and `transformers`, both in float32."""
    rounding: float
    """Difference between `transformers` in float32 and in float64."""
    spread: float
    """Standard deviation of the logits."""

    @property
    def passed(self) -> bool:
        """Whether the difference is explained by rounding; false for NaN."""
        return self.ours <= FACTOR * self.rounding


def check(directory: str | Path) -> Difference:
    """Compare the two; raises UserError if they differ by more than rounding.

    Call it outside a job, since it starts a job of one process.
    """
    found = compare(directory)
    if not found.passed:
        raise UserError(
            f"{directory}: with these settings Megatron-Core's logits differ from those of "
            f"transformers: by {found.ours:.2e} for a tiny random model (rounding "
            f"{found.rounding:.1e}, spread {found.spread:.1e})"
        )
    return found


def compare(directory: str | Path) -> Difference:
    """Return differences of logits for 64 random tokens at distant positions."""
    with tempfile.TemporaryDirectory() as scratch:
        model = write(directory, Path(scratch))
        hf = read_hf_config(scratch)
        generator = torch.Generator().manual_seed(0)
        tokens_1S = torch.randint(hf["vocab_size"], (1, TOKENS), generator=generator)
        last = min(POSITIONS, hf["max_position_embeddings"]) - 1
        positions_1S = torch.linspace(0, last, TOKENS).round().long()[None]
        theirs_SV = transformers_logits(model, tokens_1S, positions_1S)
        with computing_in_float64(model):
            reference_SV = transformers_logits(model, tokens_1S, positions_1S)
        ours_SV = megatron_logits(scratch, hf, tokens_1S, positions_1S)
        return Difference(
            float((ours_SV - theirs_SV).abs().max()),
            float((theirs_SV - reference_SV).abs().max()),
            float(reference_SV.std()),
        )


def write(directory: str | Path, target: Path) -> torch.nn.Module:
    """Save a tiny random model in float32, with only sizes changed in `config.json`.

    Returns the model of `transformers`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    (target / "config.json").write_text(json.dumps(tiny_config(directory)), encoding="utf-8")
    config = AutoConfig.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")  # its grouped products do not support float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw = torch.randn(parameter.shape, generator=generator)
            around = 1.0 if name.endswith("norm.weight") else 0.0
            scale = 1.3 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(around + scale * draw)
    save_file(dict(model.named_parameters()), target / SINGLE)
    return model


def tiny_config(directory: str | Path) -> dict[str, Any]:
    """Return the content of `config.json` with smaller sizes, but the same head size."""
    raw, hf = read_json(Path(directory) / "config.json"), read_hf_config(directory)
    groups = min(2, hf["num_key_value_heads"])
    heads = groups * min(4, hf["num_attention_heads"] // hf["num_key_value_heads"])
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16 * heads,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": hf["head_dim"],
        "pad_token_id": None,
    }
    if hf["model_type"] == "qwen3_moe":
        experts = min(8, hf["num_experts"])
        raw.pop("num_local_experts", None)
        sizes |= {"num_experts": experts, "moe_intermediate_size": 24}
        sizes["num_experts_per_tok"] = min(experts, hf["num_experts_per_tok"], 4)
    if window := sliding_window(hf):
        sizes["sliding_window"] = min(window, TOKENS // 4)
    if raw.get("layer_types"):
        sizes["layer_types"] = raw["layer_types"][:1] * 2
    return raw | sizes


@torch.no_grad()
def transformers_logits(
    model: torch.nn.Module, tokens_1S: torch.Tensor, positions_1S: torch.Tensor
) -> torch.Tensor:
    """Return logits `[tokens, vocabulary]` in float64, computed in the model's type."""
    # without a mask, gaps between positions are treated as starts of other sequences
    mask_1S = torch.ones_like(tokens_1S)
    return model(tokens_1S, position_ids=positions_1S, attention_mask=mask_1S).logits[0].double()


@torch.no_grad()
def megatron_logits(
    directory: str | Path, hf: dict[str, Any], tokens_1S: torch.Tensor, positions_1S: torch.Tensor
) -> torch.Tensor:
    """Return logits `[tokens, vocabulary]` in float64, computed in float32 by Megatron-Core."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.attention import RowLayout
    from megatron_prepo.actor.model import build_model, output_weight
    from megatron_prepo.config import ModelConfig, ParallelConfig
    from megatron_prepo.models.hf_to_megatron import load_hf_weights

    device = parallel.device()
    parallel.initialize(ParallelConfig(), seed=0)
    try:
        settings = ModelConfig(hf=str(directory), dtype="float32", layers="torch")
        (model,) = (chunk.eval() for chunk in build_model(hf, settings, ParallelConfig()))
        model = model.to(device)
        load_hf_weights([model], directory)
        layout = RowLayout(
            max_seqlen_q=int(positions_1S[0, -1]) + 1,
            positions_T=positions_1S[0].to(device),
            lengths=(tokens_1S.shape[1],),
        )
        tokens_1S, positions_1S = tokens_1S.to(device), positions_1S.to(device)
        hidden_SH = model(tokens_1S, positions_1S, None, packed_seq_params=layout).squeeze(0)
        logits_SV = hidden_SH @ output_weight(model).t()
        return logits_SV[:, : hf["vocab_size"]].double().cpu()
    finally:
        parallel.shut_down()
