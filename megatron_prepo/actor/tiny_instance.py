"""A tiny random model with the settings of a `config.json`, in Megatron-Core and in `transformers`.

The sizes are small and the rest of the file is as it stands, so that a setting of which the two
make something different shows in the logits after a second, whatever the size of the model.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config, read_json
from megatron_prepo.models.hf_files import SINGLE

POSITIONS = 2048
"""Tokens lie this far apart together: a lost rope scaling shows at thousands of positions only."""
TOKENS = 64
FACTOR = 8
"""The difference may be this many times that between `transformers` in float32 and in float64."""


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences of logits."""

    ours: float
    """Of Megatron-Core's from those of `transformers`, both in float32."""
    rounding: float
    """Of those of `transformers` in float32 from its own in float64."""
    spread: float
    """Standard deviation of the logits."""

    @property
    def passed(self) -> bool:
        """Whether it is what rounding does; false for NaN."""
        return self.ours <= FACTOR * self.rounding


def check(directory: str | Path) -> Difference:
    """Compare the two; UserError if they differ by more than rounding.

    Outside of a job: it forms one of its own.
    """
    found = compare(directory)
    if not found.passed:
        raise UserError(
            f"{directory}: with these settings Megatron-Core's logits are not those of "
            f"transformers: a tiny random model differs by {found.ours:.2e} (rounding "
            f"{found.rounding:.1e}, spread {found.spread:.1e})"
        )
    return found


def compare(directory: str | Path) -> Difference:
    """The logits of 64 random tokens that lie apart."""
    with tempfile.TemporaryDirectory() as scratch:
        model = write(directory, Path(scratch))
        hf = read_hf_config(scratch)
        generator = torch.Generator().manual_seed(0)
        tokens_1S = torch.randint(hf["vocab_size"], (1, TOKENS), generator=generator)
        last = min(POSITIONS, hf["max_position_embeddings"]) - 1
        positions_1S = torch.linspace(0, last, TOKENS).round().long()[None]
        theirs_SV = transformers_logits(model, tokens_1S, positions_1S)
        reference_SV = transformers_logits(in_float64(model), tokens_1S, positions_1S)
        ours_SV = megatron_logits(scratch, hf, tokens_1S, positions_1S)
        return Difference(
            float((ours_SV - theirs_SV).abs().max()),
            float((theirs_SV - reference_SV).abs().max()),
            float(reference_SV.std()),
        )


def write(directory: str | Path, target: Path):
    """Save a tiny random model, the file's own text but for sizes; returns that of `transformers`.

    In float32.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    (target / "config.json").write_text(json.dumps(tiny_config(directory)), encoding="utf-8")
    config = AutoConfig.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")  # its grouped products know no float64
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            draw = torch.randn(parameter.shape, generator=generator)
            around = 1.0 if name.endswith("norm.weight") else 0.0
            scale = 1.3 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(around + scale * draw)
    save_file(dict(model.named_parameters()), target / SINGLE)
    return model


def tiny_config(directory: str | Path) -> dict:
    """The content of `config.json` with other sizes, but the same size of a head."""
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
    if raw.get("layer_types"):
        sizes["layer_types"] = raw["layer_types"][:1] * 2
    return raw | sizes


def in_float64(model):
    """The same model of `transformers`, whose products are then exact beside those in float32."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_config(model.config, dtype=torch.float64).eval()
    exact.set_experts_implementation("eager")
    exact.load_state_dict(model.state_dict())
    return exact


@torch.no_grad()
def transformers_logits(model, tokens_1S: torch.Tensor, positions_1S: torch.Tensor) -> torch.Tensor:
    """`[tokens, vocabulary]` in float64, computed in the model's type."""
    # without a mask, it takes gaps between positions for the beginnings of other sequences
    mask_1S = torch.ones_like(tokens_1S)
    return model(tokens_1S, position_ids=positions_1S, attention_mask=mask_1S).logits[0].double()


@torch.no_grad()
def megatron_logits(
    directory: str | Path, hf: dict, tokens_1S: torch.Tensor, positions_1S: torch.Tensor
) -> torch.Tensor:
    """`[tokens, vocabulary]` in float64, computed in float32 by Megatron-Core's model."""
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
