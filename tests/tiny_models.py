"""Tiny random Hugging Face models of each family, and the configuration of an actor for them.

Every parameter is random, norms and biases too: a weight that is read from the wrong place, or not
at all, then shows in the logits.
"""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_prepo.config import Config, from_tree

VOCAB = 259
"""Odd: under tensor parallelism the last rank holds padding."""

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def qwen2(*, tied: bool = True) -> PreTrainedModel:
    """Return a model with biases on query, key and value."""
    config = Qwen2Config(**SHAPE, tie_word_embeddings=tied, max_position_embeddings=256)
    return randomized(Qwen2ForCausalLM(config))


def qwen3(*, tied: bool) -> PreTrainedModel:
    """Return a model with norms on query and key, and heads wider than hidden size / heads."""
    config = Qwen3Config(
        **SHAPE, head_dim=12, tie_word_embeddings=tied, max_position_embeddings=256
    )
    return randomized(Qwen3ForCausalLM(config))


def llama3(*, scaled: bool = True, tied: bool = False, layers: int = 2) -> PreTrainedModel:
    """Return a model with Llama 3.1's rope scaling, or none; the same weights either way."""
    rope = LLAMA3_ROPE if scaled else {"rope_type": "default", "rope_theta": 500000.0}
    shape = SHAPE | {"hidden_size": 64, "num_hidden_layers": layers}
    config = LlamaConfig(
        **shape, rope_parameters=rope, tie_word_embeddings=tied, max_position_embeddings=4096
    )
    return randomized(LlamaForCausalLM(config))


def mistral(*, window: int | None = None) -> PreTrainedModel:
    """Return a model with heads wider than hidden size / heads, as Mistral Nemo has them.

    `window`: tokens that a token attends to, as in Mistral 7B v0.1; the same weights with any.
    """
    config = MistralConfig(**SHAPE, head_dim=12, sliding_window=window, max_position_embeddings=256)
    return randomized(MistralForCausalLM(config))


def qwen3_moe(*, tied: bool = False, normalized: bool = True) -> PreTrainedModel:
    """Return a model with Qwen3's attention, and 8 experts of which each token takes 2.

    `normalized`: whether the probabilities of the two add up to 1.
    """
    config = Qwen3MoeConfig(
        **SHAPE,
        head_dim=12,
        moe_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=normalized,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=tied,
        max_position_embeddings=256,
    )
    return randomized(Qwen3MoeForCausalLM(config))


@torch.no_grad()
def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Draw all parameters again: gains around 1, biases of 0.3, matrices that keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        draw = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * draw)
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * draw)
        else:
            parameter.copy_(1.3 * draw / parameter.shape[-1] ** 0.5)
    return model.eval()


def save(model: PreTrainedModel, directory: Path) -> str:
    """Write the model as a Hugging Face directory, in float32."""
    model.save_pretrained(directory)
    return str(directory)


def actor_config(hf: str, **sections: dict) -> Config:
    """Return the minimal configuration of an actor, in float32, changed by `sections`."""
    tree = {
        "run": {"dir": "unused"},
        "model": {"hf": hf, "dtype": "float32"},
        "data": {"train": "unused", "eval": "unused"},
        "selection": {"num_candidates": 4, "num_selected": 2},
        "rollout": {"max_new_tokens": 4},
        "train": {"total_steps": 3},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return from_tree(tree)
