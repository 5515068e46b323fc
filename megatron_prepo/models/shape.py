"""Sizes in a `config.json` that determine memory and operations."""

from dataclasses import dataclass
from typing import Any

from megatron_prepo.models.hf_config import num_experts, sliding_window


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_size: int
    mlp: int
    """Width of the MLP, or of one expert."""
    vocabulary: int
    experts: int
    experts_per_token: int
    head_norms: bool
    """Whether queries and keys are normalised (Qwen3)."""
    window: int | None = None
    """Number of tokens that a token attends to, including itself (Mistral); None: all."""

    @classmethod
    def of(cls, hf: dict[str, Any]) -> "Shape":
        """Return the sizes of a Hugging Face configuration that `read_hf_config` has accepted."""
        experts, heads = num_experts(hf), hf["num_attention_heads"]
        return cls(
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            heads=heads,
            groups=hf.get("num_key_value_heads") or heads,
            head_size=hf.get("head_dim") or hf["hidden_size"] // heads,
            mlp=hf["moe_intermediate_size"] if experts else hf["intermediate_size"],
            vocabulary=hf["vocab_size"],
            experts=experts,
            experts_per_token=hf["num_experts_per_tok"] if experts else 0,
            head_norms=hf["model_type"].startswith("qwen3"),
            window=sliding_window(hf),
        )

    @property
    def queries(self) -> int:
        """Total width of the queries of a token."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Total width of the keys of a token, and of its values."""
        return self.groups * self.head_size

    @property
    def idle_parameters(self) -> int:
        """Number of parameters in experts to which a token is not routed."""
        idle = self.experts - self.experts_per_token
        return self.layers * idle * 3 * self.hidden * self.mlp
